"""Fingerprints of a model folder, so that a changed model is noticed without hashing gigabytes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colqwen3.system.errors import UserError

WHOLE_DIGEST_LIMIT = 64 << 20  # larger files are sampled: hashing 9 GB takes half a minute
SAMPLES, SAMPLE_BYTES = 64, 4096


def model_files(folder: Path) -> Iterator[Path]:
    """Yield the files that make up a model: weights, configs and tokenizer, in name order."""
    suffixes = (".json", ".txt", ".jinja", ".safetensors", ".py")
    yield from sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes
    )


def fingerprint(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file; of a large one, of 64 evenly spaced samples.

    A sampled digest tells retrained or damaged weights apart without reading gigabytes; it does
    not prove that no single byte between the samples changed.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_DIGEST_LIMIT:
            digest.update(file.read())
            return {"size": size, "sha256": digest.hexdigest()}
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"size": size, "sampled_sha256": digest.hexdigest()}


def check_unchanged(folder: Path, files: dict[str, Any]) -> None:
    """Compare a model folder with the files of the manifest.

    Raises
    ------
    UserError
        If a file was added, removed or changed since `inspect` ran.
    """
    now = {path.name: fingerprint(path) for path in model_files(folder)}
    for name in sorted(files.keys() | now.keys()):
        if files.get(name) != now.get(name):
            raise UserError(
                f"{folder / name}: changed since it was inspected; run `dvc repro -f inspect`"
            )
