"""A lock: one holder at a time, known by its number, and free once its process ends."""

import os
import subprocess
import sys
from pathlib import Path

from colqwen3.system.lock import Lock

HOLD = """
import sys
from pathlib import Path
from colqwen3.system.lock import Lock
lock = Lock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "new" / "x.lock"), Lock(tmp_path / "new" / "x.lock")
    assert first.take()
    assert not second.take()
    assert first.holder() == second.holder() == str(os.getpid())
    first.release()
    assert second.take()
    second.release()


def test_a_lock_of_another_process_is_seen_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert holder.stdout
    try:
        assert holder.stdout.readline() == "True\n"
        lock = Lock(path)
        assert not lock.take()
        assert lock.holder() == str(holder.pid)
    finally:
        holder.kill()  # no chance to give it back
        holder.communicate()
    assert lock.take()
    assert lock.holder() == str(os.getpid())
    lock.release()


def test_a_released_lock_leaves_no_file_when_asked(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "x.lock")
    assert lock.take()
    lock.release()
    assert not lock.path.with_name("x.lock.pid").exists()
    assert lock.take()
    lock.release(delete=True)
    assert not list(tmp_path.iterdir())


def test_who_waits_for_a_deleted_lock_gets_a_lock_of_its_own_file(tmp_path: Path) -> None:
    """A process that opened the file before it was deleted must not share it with a later one."""
    first, second, third = (Lock(tmp_path / "x.lock") for _ in range(3))
    assert first.take()
    assert not second.take()
    first.release(delete=True)
    assert second.take()
    assert not third.take()
    second.release(delete=True)


def test_an_unknown_holder_is_called_so(tmp_path: Path) -> None:
    assert Lock(tmp_path / "x.lock").holder() == "unknown"
    (tmp_path / "x.lock.pid").write_text("")
    assert Lock(tmp_path / "x.lock").holder() == "unknown"
