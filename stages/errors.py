"""The one error type that a user is meant to see, and the way a stage ends on it."""

import errno
import logging
import sys
from collections.abc import Callable

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")


class PipelineError(Exception):
    """A problem that the user can mend: one line naming the file or key, and the mend.

    What it quotes may come from a hostile file: unprintable characters are escaped.
    """

    def __init__(self, message: str) -> None:
        printable = (c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__("".join(printable))


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception says that a disk is full or a quota is used up.

    safetensors and torch raise types of their own, which carry no more than the system's text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL
    return any(text in str(error) for text in DISK_FULL_TEXTS)


def run(main: Callable[[], None]) -> None:
    """Run a stage's ``main`` with logging on stderr.

    A `PipelineError` and a full disk end as one line and status 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        main()
    except PipelineError as error:
        _end(str(error))
    except Exception as error:
        if not disk_is_full(error):
            raise
        name = getattr(error, "filename2", None) or getattr(error, "filename", None)
        where = f"{name}: " if name else ""
        _end(
            f"{where}the disk is full or a quota is used up; free space (`dvc gc -w` drops old "
            "results), or put artifacts/ on a larger disk, and run again"
        )


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
