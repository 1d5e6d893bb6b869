"""The error that a user is meant to see, and the way a command ends on it."""

import errno
import logging
import os
import sys
from collections.abc import Callable

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
UNUSABLE_PATHS = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
BROKEN_PIPE = 141
INTERRUPTED = 130
"""Exit statuses as a shell gives them: 128 + SIGPIPE, 128 + SIGINT."""


class UserError(Exception):
    """A problem that the user can fix: one line naming the file or key, then the fix.

    The message may quote a hostile file, so unprintable characters are escaped.
    """

    def __init__(self, message: str) -> None:
        printable = (c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__("".join(printable))


class DiskFullError(UserError):
    """There is not enough free disk space for what is about to be written."""


class NonFiniteWeightsError(UserError):
    """A weight is NaN or infinite."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception says that a disk is full or a quota is used up.

    safetensors and torch raise their own types, which carry only the system's text.
    """
    if isinstance(error, DiskFullError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL
    return any(text in str(error) for text in DISK_FULL_TEXTS)


def run(main: Callable[[], None]) -> None:
    """Run a command's ``main`` with logging on stderr.

    A `UserError`, a full disk and Ctrl-C end in one line and a non-zero status; any other
    exception is a defect and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        main()
    except UserError as error:
        _end(str(error))
    except KeyboardInterrupt:
        _end("interrupted; run the same command again to continue", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch is not imported here
            _end(f"{first_line(error)}; use smaller batches (see docs/troubleshooting.md)")
        if isinstance(error, UNUSABLE_PATHS) and error.filename:
            reason = (error.strerror or type(error).__name__).lower()
            _end(f"{error.filename}: {reason}; correct the path or its permissions")
        if not disk_is_full(error):
            raise
        name = getattr(error, "filename2", None) or getattr(error, "filename", None)
        where = f"{name}: " if name else ""
        _end(
            f"{where}the disk is full or a quota is used up; free some space (`dvc gc -w` drops old "
            "results) and run again"
        )


def _end(message: str, status: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
