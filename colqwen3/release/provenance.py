"""quantization_metadata.json of a released folder: its origin, and a digest of all it contains."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

from colqwen3.checkpoint.headers import read_header, read_headers
from colqwen3.checkpoint.quantization import embeddings_bits, linear_bits
from colqwen3.system.files import digest_file, dump_json, expand_user

METADATA = "quantization_metadata.json"
SELF_DIGEST = "sha256_of_the_rest"
FORMAT_VERSION = 1
CHUNK = 16 << 20
PIPELINE = ("colqwen3", "stages", "dvc.yaml", "params.yaml", "pyproject.toml", "requirements.txt")
"""What determines a checkpoint. Metrics and locks do not: they are committed afterwards."""


def digest_weights(path: Path) -> tuple[str, dict[str, str]]:
    """Return the SHA-256 of a safetensors file, and of each tensor in it, reading it once.

    Raises
    ------
    UserError
        If the file is damaged.
    """
    tensors = sorted(read_header(path).items(), key=lambda item: item[1].start)
    whole, digests = hashlib.sha256(), {}
    with path.open("rb") as file:
        whole.update(file.read(tensors[0][1].start if tensors else path.stat().st_size))
        for name, tensor in tensors:
            own, left = hashlib.sha256(), tensor.nbytes
            while left and (chunk := file.read(min(CHUNK, left))):
                own.update(chunk)
                whole.update(chunk)
                left -= len(chunk)
            digests[name] = own.hexdigest()
    return whole.hexdigest(), digests


def describe_files(folder: Path) -> dict[str, Any]:
    """Return size and SHA-256 of every file but the metadata, and dtype, shape and SHA-256 of every tensor.

    Raises
    ------
    UserError
        If a safetensors file is damaged.
    """
    files, tensors = {}, {}
    for path in sorted(folder.iterdir()):
        if path.name == METADATA:
            continue
        if path.suffix == ".safetensors":
            digest, digests = digest_weights(path)
            for name, tensor in read_header(path).items():
                tensors[name] = {
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "file": path.name,
                    "sha256": digests[name],
                }
        else:
            digest = digest_file(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    return {"files": files, "tensors": tensors}


def layer_table(checkpoint: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return name, bits and group size of every quantized module, read from the stored tensors.

    Parameters
    ----------
    checkpoint
        Its folder.
    config
        Its config.json.
    """
    stored = read_headers(checkpoint)
    table = []
    for name, tensor in sorted(stored.items()):
        module, _, part = name.rpartition(".")
        if part == "qweight":
            bits = linear_bits(config["quantization_config"], module)
            in_features = tensor.shape[0] * 32 // bits
            groups = stored[f"{module}.scales"].shape[0]
        elif part == "weight_packed":
            bits = embeddings_bits(config, stored)
            in_features = tensor.shape[1] * 32 // bits
            groups = stored[f"{module}.weight_scale"].shape[1]
        else:
            continue
        table.append({"name": module, "bits": bits, "group_size": in_features // groups})
    return table


def pipeline_commit() -> dict[str, Any]:
    """Return the last commit that changed the pipeline's own files, and whether they differ from it.

    It is not HEAD: a release that named HEAD would differ after every commit, that of its own
    metrics included. Both are None where there is no Git repository.
    """
    commit = _git("log", "-1", "--format=%H", "--", *PIPELINE)
    changed = _git("status", "--porcelain", "--", *PIPELINE)
    return {"commit": commit or None, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def seal(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return metadata with a SHA-256 over all the rest of it."""
    rest = {key: value for key, value in metadata.items() if key != SELF_DIGEST}
    return {**rest, SELF_DIGEST: hashlib.sha256(dump_json(rest).encode()).hexdigest()}


def is_sealed(text: str, metadata: Any) -> bool:
    """Whether the text of a metadata file is, to the byte, what `seal` and ``write_json`` give."""
    return isinstance(metadata, dict) and text == dump_json(seal(metadata))


def shown_path(path: str) -> str:
    """Return a path of params.yaml as it may be published: an absolute one by its name alone."""
    return Path(path).name if expand_user(path).is_absolute() else path


def shown_params(values: Any) -> Any:
    """Return a JSON value of parameters with every path in it as `shown_path` gives it."""
    if isinstance(values, dict):
        return {key: shown_params(value) for key, value in values.items()}
    return shown_path(values) if isinstance(values, str) else values


def parse(text: str) -> Any:
    """Return the JSON value of a metadata file, None if it is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
