"""How a stage starts: which recipe, alone on its results, and bound to the DVC that runs it.

A killed ``dvc`` leaves its stage running. Left alone, that stage would overwrite the results of
the next run, which may use other parameters.
"""

import argparse
import logging
import math
import os
import signal
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from colqwen3.system.files import digest_files
from colqwen3.system.lock import Lock
from stages import PARENT
from stages.pipeline.paths import LOCKS

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
"""Where dvc.yaml and the code lie; results go to the current folder."""
CODE = ("stages", "colqwen3")
POLL, REMIND = 1.0, 60.0
"""Seconds between two looks at a lock or a parent, and between two lines about waiting."""

_held: dict[Path, Lock] = {}


def stage_parser(stage: str, description: str | None) -> argparse.ArgumentParser:
    """Return the command-line parser of a stage."""
    return argparse.ArgumentParser(prog=f"python -m stages.{stage}", description=description)


def parse_recipe(stage: str, description: str | None) -> str:
    """Return the one argument of a stage: the name of a recipe."""
    parser = stage_parser(stage, description)
    parser.add_argument("recipe", help="name of a recipe in params.yaml")
    recipe: str = parser.parse_args().recipe
    return recipe


@cache
def code_digest(stage: str) -> str:
    """Return the SHA-256 of the code that a stage of dvc.yaml depends on.

    Unfinished work is kept under this digest, so it survives exactly those edits that do not make
    DVC run the stage again.

    Parameters
    ----------
    stage
        Its name in dvc.yaml, without ``@<recipe>``.
    """
    body: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"][stage]
    files: set[Path] = set()
    for dep in body.get("do", body)["deps"]:
        path = ROOT / dep
        if Path(dep).parts[0] in CODE:
            files |= {path} if path.is_file() else {*path.rglob("*.py"), *path.rglob("*.cu")}
    return digest_files(ROOT, files)


def claim(stage: str) -> None:
    """Keep the results of a stage to this process until it ends.

    While another process works on them, wait and say so. When DVC started this process and is
    gone, end it as SIGTERM does; the next run continues unfinished work.
    """
    lock = Lock((LOCKS / f"{stage}.lock").absolute())
    if lock.path in _held:
        return
    if "DVC_STAGE" in os.environ:  # started by hand, a stage may well outlive its shell
        threading.Thread(target=_end_with, args=(PARENT,), daemon=True).start()
    reminded = -math.inf
    while not lock.take():
        if time.monotonic() - reminded >= REMIND:
            reminded = time.monotonic()
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
