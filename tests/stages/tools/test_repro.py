"""`make repro` ends with DVC's status and a table, and with everything stopped on Ctrl-C."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colqwen3.system.errors import INTERRUPTED
from tests.helpers.command import alive
from tests.helpers.work import make_work

ROOT = Path(__file__).resolve().parents[3]
# a dvc that runs a stage, and goes on with the next when that one fails
KEEPS_GOING = """\
#!{python}
import signal, subprocess, sys
for number in range(3):
    stage = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as DVC does, once the stage has begun
    print(stage.pid, flush=True)
    stage.wait()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
"""
FAILS = "#!{python}\nimport sys\nprint(*sys.argv[1:])\nsys.exit(3)\n"


def start(folder: Path, dvc: str) -> subprocess.Popen[str]:
    tool = folder / "bin/dvc"
    tool.parent.mkdir()
    tool.write_text(dvc.format(python=sys.executable))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(tool.parent), os.environ["PATH"]])
    return subprocess.Popen(
        [sys.executable, "-m", "stages.tools.repro", "--dry"],
        cwd=folder, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return make_work(tmp_path / "work")


def test_ctrl_c_stops_dvc_and_ends_in_one_line(work: Path) -> None:
    process = start(work, KEEPS_GOING)
    assert process.stdout
    stage = int(process.stdout.readline())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert err.splitlines()[-1] == "error: interrupted; run `make repro` again to continue"
    assert "Traceback" not in err
    for _ in range(100):
        if not alive(stage):
            break
        time.sleep(0.05)
    assert not alive(stage)
    for later in out.split():  # one more may have begun in between: stages end with their DVC
        if alive(int(later)):
            os.kill(int(later), signal.SIGKILL)


def test_the_status_of_dvc_is_passed_on_and_results_are_shown_or_said_to_be_absent(
    work: Path,
) -> None:
    process = start(work, FAILS)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "repro --keep-going --dry" in out
    assert "Not evaluated: rtn, tuned." in out or "no table of results" in err
    assert "Traceback" not in err
