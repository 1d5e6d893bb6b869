"""One run at a time: who has a lock is known, and nobody outlives the DVC that started it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.pipeline import stage as lock
from tests.helpers.command import alive

ROOT = Path.cwd()
CLAIM = """
import logging, time
from stages.pipeline import stage as lock
logging.basicConfig()
lock.POLL = 0.05
lock.claim("work")
print("claimed", flush=True)
time.sleep(60)
"""
# a dvc that starts a stage and waits for it
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CLAIM!r}])
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(
    started: list[subprocess.Popen[str]], folder: Path, code: str, **env: str
) -> subprocess.Popen[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "DVC_STAGE"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env={**inherited, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started.append(process)
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def wait_for_end(stage: int) -> None:
    for _ in range(200):
        if not alive(stage):
            return
        time.sleep(0.05)
    os.kill(stage, signal.SIGKILL)
    pytest.fail("the stage outlives its dvc")


def test_a_second_run_waits_and_says_for_whom(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    first = start(started, tmp_path, CLAIM)
    assert line(first) == "claimed"
    second = start(started, tmp_path, CLAIM)
    assert second.stderr
    assert f"process {first.pid} is working on work" in second.stderr.readline()
    first.kill()  # nobody gives the lock up for it
    assert line(second) == "claimed"


def test_other_work_need_not_wait(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    for name in ("work", "other"):
        process = start(started, tmp_path, CLAIM.replace('"work"', repr(name)))
        assert line(process) == "claimed"


def test_a_claim_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lock.claim("again")
    lock.claim("again")


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_ends_with_its_dvc(
    tmp_path: Path, started: list[subprocess.Popen[str]], by: signal.Signals
) -> None:
    parent = start(started, tmp_path, PARENT, DVC_STAGE="work")
    stage = int(line(parent))
    assert line(parent) == "claimed"
    parent.send_signal(by)
    parent.wait()
    wait_for_end(stage)


def test_so_does_one_whose_dvc_went_before_it_could_claim(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Most of a short stage is the import of torch."""
    slow = CLAIM.replace("lock.POLL", "print('imported', flush=True); time.sleep(0.5); lock.POLL")
    parent = start(started, tmp_path, PARENT.replace(repr(CLAIM), repr(slow)), DVC_STAGE="work")
    stage = int(line(parent))
    assert line(parent) == "imported"
    parent.kill()
    wait_for_end(stage)


def test_a_stage_run_by_hand_may_outlive_its_shell(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    parent = start(started, tmp_path, PARENT)
    stage = int(line(parent))
    assert line(parent) == "claimed"
    parent.kill()
    parent.wait()
    time.sleep(0.5)  # ten looks at the parent
    assert alive(stage)
    os.kill(stage, signal.SIGKILL)


def test_code_digest_follows_the_folders_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half done survives exactly those edits that do not make DVC run the stage again."""
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    shutil.copytree(ROOT / "colqwen3", tmp_path / "colqwen3")
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    monkeypatch.setattr(lock, "ROOT", tmp_path)

    def changed(path: str) -> set[str]:
        names = ("quantize", "embed", "benchmark")
        before = {name: lock.code_digest.__wrapped__(name) for name in names}
        file = tmp_path / path
        file.write_text(file.read_text() + "\n# a comment\n")
        return {name for name in names if lock.code_digest.__wrapped__(name) != before[name]}

    assert changed("stages/tools/report.py") == set()
    assert changed("stages/evaluation/retrieval.py") == set()
    assert changed("stages/quantization/recipes.py") == {"quantize"}
    assert changed("colqwen3/embedding/store.py") == {"embed"}
    assert changed("colqwen3/serving/runtime.py") == {"embed", "benchmark"}
    assert changed("colqwen3/model/scoring.py") == {"quantize", "embed", "benchmark"}
    assert changed("stages/embed.py") == {"embed"}
