"""How a command ends: in one line on what the user can fix, in a traceback on anything else."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from colqwen3.system.errors import UserError, run


def command_that(fails: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise fails

    return main


def ended(main: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_an_error_of_the_user_is_its_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = ended(command_that(UserError("f.json: is bad\x1b; fix it")), capsys)
    assert line == "error: f.json: is bad\\x1b; fix it"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        Path("/dev/full").write_text("x")

    assert ended(main, capsys).startswith("error: the disk is full")


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "from", None, "to"), "to: the disk is full"),
        (
            SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            "the disk is full",
        ),
        (RuntimeError("write failed: Disk quota exceeded"), "the disk is full"),
    ],
)
def test_so_is_one_that_a_library_reports(
    error: Exception, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ended(command_that(error), capsys)
    assert line.startswith(f"error: {start}")
    assert "free some space" in line


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO), "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "a"),
        ValueError("wrong"),
    ],
)
def test_anything_else_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        run(command_that(error))
    assert caught.value is error


def test_an_interrupted_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(command_that(KeyboardInterrupt()))
    assert caught.value.code == 128 + signal.SIGINT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: interrupted; run the same command again to continue"
