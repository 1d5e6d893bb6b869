"""One run at a time: who has a lock is known, and nobody outlives the DVC that started it."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colqwen3.system.lock import Lock
from stages.pipeline import stage as lock
from tests.helpers.command import alive

ROOT = Path.cwd()
CLAIM = """
import logging, time
from stages import lock
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


def test_a_lock_is_had_once_and_given_up(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "new" / "a.lock"), Lock(tmp_path / "new" / "a.lock")
    assert first.take()
    assert not second.take()
    assert second.holder() == str(os.getpid())
    first.release()
    assert second.take()
    second.release(delete=True)
    assert not list((tmp_path / "new").iterdir())
    assert first.take()


def test_a_deleted_lock_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder deletes it between another's opening and locking it."""
    first, second, third = (Lock(tmp_path / "a.lock") for _ in range(3))
    assert first.take()
    locked = fcntl.flock

    def late(*args: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", locked)
        first.release(delete=True)
        locked(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    assert second.take()
    assert not third.take()


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
