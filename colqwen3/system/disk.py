"""Whether a disk has room for what long work is about to write, asked before it starts."""

import logging
import shutil
from pathlib import Path

from colqwen3.system.errors import DiskFullError

logger = logging.getLogger(__name__)


def existing(folder: Path) -> Path:
    """Return `folder`, or the nearest folder above it that exists."""
    path = folder.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_space(folder: Path, needed: int, what: str) -> None:
    """Compare the bytes that `what` will write under `folder` with those free on its disk.

    Parameters
    ----------
    folder
        Where it will be written; need not exist yet.
    needed
        Bytes, an upper bound.
    what
        The thing to write, for the message.

    Raises
    ------
    DiskFullError
        If less is free.
    """
    free = shutil.disk_usage(existing(folder)).free
    if needed > free:
        raise DiskFullError(
            f"{folder}: needs {needed} bytes for {what}, {free} bytes are free; "
            "free some space there, or mount a larger disk (see docs/troubleshooting.md)"
        )
    logger.info("%s: needs %.3g GB, %.3g GB free", what, needed / 1e9, free / 1e9)
