"""artifacts/manifest.json: what the inspected model is; later stages depend on it alone."""

from pathlib import Path
from typing import Any

from colqwen3.checkpoint.fingerprint import check_unchanged
from colqwen3.checkpoint.hub import find_model
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json
from stages.pipeline.params import ModelParams
from stages.pipeline.paths import MANIFEST


def read_manifest(path: Path = MANIFEST) -> dict[str, Any]:
    """Read the manifest.

    Raises
    ------
    UserError
        If it is missing or damaged.
    """
    fix = "run `dvc repro inspect`"
    manifest = read_json(path, fix)
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(key), dict) for key in ("files", "linears")
    ):
        raise UserError(f"{path}: is not a manifest; {fix}")
    return manifest


def find_inspected_model(model: ModelParams, manifest: dict[str, Any]) -> Path:
    """Return the folder of the source model, after checking that it is the inspected one.

    Raises
    ------
    UserError
        If it cannot be found, or changed since `inspect` ran.
    """
    folder = find_model(model.source, model.revision, model.trust_remote_code)
    check_unchanged(folder, manifest["files"])
    return folder
