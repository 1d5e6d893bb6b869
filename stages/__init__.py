"""The pipeline: each module here is one DVC stage; the folders hold what stages share."""

import os
import sys
from importlib.util import find_spec

# noted here, before imports that take seconds: `stages.pipeline.stage.claim` ends a stage whose
# parent, the DVC that started it, is gone
PARENT = os.getppid()

NEEDED = ("torch", "transformers", "auto_round", "safetensors", "PIL", "pydantic", "ruamel.yaml")
"""Packages without which a stage ends in a traceback; looked for without importing them."""


def missing_packages() -> list[str]:
    """Return the packages of the pipeline that this Python does not have."""
    missing = []
    for name in NEEDED:
        try:
            present = find_spec(name) is not None
        except ModuleNotFoundError:  # the package that it lies in is missing
            present = False
        if not present:
            missing.append(name)
    return missing


if "DVC_STAGE" in os.environ and (absent := missing_packages()):
    sys.exit(
        f"error: {sys.executable}: lacks {', '.join(absent)}; run `make setup`, then `make repro`, or "
        "`.venv/bin/dvc repro` with .venv/bin first in PATH"
    )
