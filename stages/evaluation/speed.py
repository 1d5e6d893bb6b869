"""Where the timings of a checkpoint lie on this machine, and whether they are of that checkpoint."""

import hashlib
from pathlib import Path
from typing import Any

from colqwen3.checkpoint.fingerprint import fingerprint, model_files
from colqwen3.system.files import dump_json, read_json
from stages.pipeline.paths import SPEED


def checkpoint_digest(folder: Path) -> str:
    """Return a SHA-256 that tells checkpoints apart without reading gigabytes, see `fingerprint`."""
    prints = {path.name: fingerprint(path) for path in model_files(folder)}
    return hashlib.sha256(dump_json(prints).encode()).hexdigest()


def speed_file(recipe: str, digest: str) -> Path:
    """Return the file of the timings of one checkpoint; other checkpoints of a recipe have others."""
    return SPEED / f"{recipe}-{digest[:12]}.json"


def read_speed(recipe: str, checkpoint: Path) -> dict[str, Any] | None:
    """Return the timings of a checkpoint on this machine; None where it was not timed."""
    if not checkpoint.is_dir():
        return None
    digest = checkpoint_digest(checkpoint)
    path = speed_file(recipe, digest)
    if not path.exists():
        return None
    timings: dict[str, Any] = read_json(path, f"run `dvc repro -f -s benchmark@{recipe}`")
    return timings if timings.get("checkpoint") == digest else None
