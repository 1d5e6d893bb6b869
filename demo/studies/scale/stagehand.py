"""Runs the pipeline's stages one after the other in a process that keeps its imports.

A stage begins with seconds of importing torch, transformers and auto-round.  A process of a pool
runs dozens of stages and pays that once; each runs as ``python -m stages.<name>`` would.
"""

import gc
import os
import runpy
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from colqwen3.system.errors import UserError

STAGES, LIBRARY = "stages", "colqwen3"


def run_stage(folder: Path, log: Path, stage: str, *arguments: str) -> float:
    """Run a stage in a folder and return its seconds.

    Parameters
    ----------
    folder : Path
        With the params.yaml of the stage.
    log : Path
        Where its output is appended.
    stage : str
        Name of the stage's module, or ``colqwen3`` for a command of the library.
    *arguments : str
        Its command line.

    Raises
    ------
    UserError
        If it fails, with the last line that it wrote.
    """
    start = time.monotonic()
    home, command = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = [stage, *arguments]
    status: object = 0
    try:
        with _output_to(log):
            try:
                module = stage if stage == LIBRARY else f"{STAGES}.{stage}"
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code
            except Exception:
                traceback.print_exc()
                status = 1
    finally:
        os.chdir(home)
        sys.argv = command
        _free_memory()
    if status not in (0, None):
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("error: ") if lines else "no output"
        raise UserError(f"stage {' '.join((stage, *arguments))} failed ({reason}); see {log}")
    return time.monotonic() - start


def run_stages(
    root: Path, folder: Path, log: Path, commands: Sequence[Sequence[str]]
) -> list[float]:
    """Run stages in a folder, each a name and its arguments, and return the seconds of each.

    Parameters
    ----------
    root : Path
        The repository, from which the stages are imported.
    folder, log : Path
        As of `run_stage`.
    commands : sequence
        The stages in order.

    Raises
    ------
    UserError
        If one fails; those after it do not run.
    """
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return [run_stage(folder, log, *command) for command in commands]


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append what is written to stdout and stderr to a file, that of libraries included."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    saved = [os.dup(number) for number in (1, 2)]
    with path.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _free_memory() -> None:
    """Give back what a stage left, as the end of its process would."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
