"""Bytes of original and quantized, by part of the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json

COMPONENTS = ("language_model", "projection", "token_embeddings", "vision")
PARTS = ("files", *COMPONENTS)
MODEL_KEYS = {"files": "files_bytes"} | {name: f"components.{name}.bytes" for name in COMPONENTS}
QUANTIZE_KEYS = {"files": "bytes.files"} | {name: f"bytes.components.{name}" for name in COMPONENTS}


def compare_sizes(original: Mapping[str, int], quantized: Mapping[str, int]) -> dict[str, Any]:
    """Return bytes of both by part, original / quantized as ``ratio``, and the reduction in %."""
    return {
        part: {
            "original": original[part],
            "quantized": quantized[part],
            "ratio": original[part] / quantized[part],
            "reduction_percent": 100 * (1 - quantized[part] / original[part]),
        }
        for part in PARTS
    }


def read_bytes(path: Path, keys: Mapping[str, str], fix: str) -> dict[str, int]:
    """Return the bytes of each part, from the dotted keys of a metrics file.

    Raises
    ------
    UserError
        If the file is missing, or lacks a figure.
    """
    metrics = read_json(path, fix)
    sizes = {}
    for part in PARTS:
        value = metrics
        for key in keys[part].split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{path}: {keys[part]} is {value!r}, no number of bytes; {fix}")
        sizes[part] = value
    return sizes
