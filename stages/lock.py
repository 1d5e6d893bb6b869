"""One run at a time: a stage locks its results while it works, and ends with the DVC that ran it.

A killed ``dvc`` leaves its stage running. Left alone, it would write its results over those of the
next run, made perhaps of other parameters.
"""

import fcntl
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path

from stages import PARENT
from stages.paths import LOCKS

logger = logging.getLogger(__name__)

POLL, REMIND = 1.0, 60.0
"""Seconds between two looks at a lock or a parent, and between two lines about waiting."""

_held: dict[Path, "Lock"] = {}


class Lock:
    """A lock on a file of its own, given up by `release` or by the end of the process.

    Parameters
    ----------
    path
        The file; it holds the number of the process that has the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self) -> bool:
        """Take the lock; return False when another process has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = self.path.open("a+")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                return False
            # the holder may have deleted the file between our opening and locking it
            if self.path.exists() and os.path.samestat(
                os.fstat(self._file.fileno()), self.path.stat()
            ):
                break
            self._file.close()
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return True

    def holder(self) -> str:
        """Return the number of the process that has the lock, as far as is known."""
        try:
            return self.path.read_text().strip() or "unknown"
        except OSError:
            return "unknown"

    def release(self, delete: bool = False) -> None:
        """Give up the lock; with `delete`, its file goes too."""
        if delete:
            self.path.unlink(missing_ok=True)
        self._file.close()


def claim(stage: str) -> None:
    """Keep the results of a stage to this process until it ends.

    While another process has them, wait and say so. When DVC started this process and is gone,
    end it, as by SIGTERM; what is resumed, is resumed by the next run.
    """
    lock = Lock((LOCKS / f"{stage}.lock").absolute())
    if lock.path in _held:
        return
    if "DVC_STAGE" in os.environ:  # by hand, a stage may well outlive its shell
        threading.Thread(target=_end_with, args=(PARENT,), daemon=True).start()
    said = -math.inf
    while not lock.take():
        if time.monotonic() - said >= REMIND:
            said = time.monotonic()
            logger.warning(
                "process %s is working on %s; waiting until it ends (or stop it: kill %s)",
                lock.holder(), stage, lock.holder(),
            )  # fmt: skip
        time.sleep(POLL)
    _held[lock.path] = lock


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    logger.error("the dvc that started this stage is gone: ending, so that it can run again")
    os.kill(os.getpid(), signal.SIGTERM)
