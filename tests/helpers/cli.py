"""The command `colqwen3` of the working tree, in this process and in one of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from colqwen3.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]


def execute(*words: str | Path) -> None:
    """Run a subcommand in this process; what it raises comes through."""
    args = build_parser().parse_args(list(map(str, words)))
    args.execute(args)


def run_command(
    *words: str | Path,
    code: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m colqwen3` in a process of its own, or `code` with the same arguments."""
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else ["-m", "colqwen3"]), *map(str, words)],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a command that refused its input."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line
