"""artifacts/manifest.json: what the inspected model is; later stages depend on it alone."""

from pathlib import Path
from typing import Any

from stages.checkpoint import check_unchanged, find_model
from stages.errors import PipelineError
from stages.files import read_json
from stages.params import ModelParams
from stages.paths import MANIFEST


def read_manifest(path: Path = MANIFEST) -> dict[str, Any]:
    """Read the manifest.

    Raises
    ------
    PipelineError
        If it is missing or damaged.
    """
    mend = "run `dvc repro inspect`"
    manifest = read_json(path, mend)
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(key), dict) for key in ("files", "linears")
    ):
        raise PipelineError(f"{path}: is no manifest; {mend}")
    return manifest


def find_inspected_model(model: ModelParams, manifest: dict[str, Any]) -> Path:
    """Return the folder of the source model, after checking that it is the inspected one.

    Raises
    ------
    PipelineError
        If it cannot be found, or changed since `inspect` ran.
    """
    folder = find_model(model.source, model.revision, model.trust_remote_code)
    check_unchanged(folder, manifest["files"])
    return folder
