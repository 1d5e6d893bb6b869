"""A lock on a result, given up by `release` or by the end of the process."""

import os
from pathlib import Path

from filelock import FileLock, Timeout


class Lock:
    """A lock that one process at a time can hold.

    Parameters
    ----------
    path
        The locked file; ``<path>.pid`` beside it names the process that holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path, timeout=0, thread_local=False)
        self._pid = path.with_name(path.name + ".pid")

    def take(self) -> bool:
        """Take the lock; return False when another process has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            return False
        self._pid.write_text(str(os.getpid()))
        return True

    def holder(self) -> str:
        """Return the number of the process that has the lock, as far as is known."""
        try:
            return self._pid.read_text().strip() or "unknown"
        except OSError:
            return "unknown"

    def release(self, delete: bool = False) -> None:
        """Give up the lock; with `delete`, its file goes too."""
        self._pid.unlink(missing_ok=True)
        if delete:  # a process that has just opened it notices, and opens a new one
            self.path.unlink(missing_ok=True)
        self._lock.release()
