"""How a command ends: in one line on what the user can fix, in a traceback on anything else."""

import errno
import os
import signal
import subprocess
import sys
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
        ValueError("wrong"),
    ],
)
def test_anything_else_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        run(command_that(error))
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "a/b"),
        FileExistsError(errno.EEXIST, "File exists", "a/b"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "a/b"),
    ],
)
def test_an_unusable_path_is_one_line(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    line = ended(command_that(error), capsys)
    assert line == f"error: a/b: {str(error.strerror).lower()}; correct the path or its permissions"


def test_exhausted_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    line = ended(command_that(torch.OutOfMemoryError("CUDA out of memory: 3 GB\nmore")), capsys)
    assert line.startswith("error: CUDA out of memory: 3 GB; use smaller batches")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "from colqwen3.system.errors import run\n"
        "def main():\n    for _ in range(100_000):\n        print('x' * 100)\n"
        "run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_an_interrupted_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(command_that(KeyboardInterrupt()))
    assert caught.value.code == 128 + signal.SIGINT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: interrupted; run the same command again to continue"
