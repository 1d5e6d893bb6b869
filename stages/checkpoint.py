"""Finding a model folder, and reading its safetensors headers without its weights.

The header format is that of the safetensors library: eight bytes of little-endian length, then
JSON of name -> dtype, shape and data offsets, then the data without gaps. The library's own
reader maps the whole file; the standard library reads nine gigabytes of headers in milliseconds.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import PipelineError
from stages.files import read_json
from stages.layout import is_unused, published_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # the safetensors library's own limit
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
WHOLE_DIGEST_LIMIT = 64 << 20  # larger files are sampled: hashing 9 GB takes half a minute
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header; its data begin at byte `start` of `file`."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    start: int


def find_model(source: str, revision: str | None, trust_remote_code: bool = False) -> Path:
    """Return the folder of a model: `source` itself, or its snapshot from the Hub.

    Only JSON, text and safetensors files are fetched, and Python files when the user trusts them.
    ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` are honoured by huggingface_hub.

    Raises
    ------
    PipelineError
        If `source` is neither a folder nor a Hub id whose files can be had.
    """
    folder = Path(source).expanduser()
    if source and _is(folder, Path.is_dir):
        return folder
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", source) or ".." in source:
        raise PipelineError(
            f"{source}: no such folder; give a model folder or a Hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [
        "*.json",
        "*.txt",
        "*.jinja",
        "*.safetensors",
        "LICEN[SC]E*",
        "NOTICE*",
        "README.md",
    ]
    if trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        at = f" at revision {revision}" if revision else ""
        raise PipelineError(
            f"{source}{at}: no such folder, and the Hub cannot give it ({reason}); "
            "check the name, the revision, the network and HF_TOKEN"
        ) from None


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Return ``kind(path)``, False where the name itself is impossible."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, from its index or the single file.

    Raises
    ------
    PipelineError
        If there are none, the index is damaged, or it names a file outside the folder.
    """
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, "fetch it again")
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise PipelineError(f"{folder / INDEX}: has no weight_map; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise PipelineError(
            f"{folder}: holds only pickled weights, which are never read; convert to safetensors"
        )
    else:
        raise PipelineError(
            f"{folder}: holds neither {INDEX} nor {SINGLE}; give a complete model folder"
        )
    return [_inside(folder, name) for name in names]


def _inside(folder: Path, name: str) -> Path:
    """Return ``folder / name`` if it is a plain file of that folder."""
    path = folder / name
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise PipelineError(
            f"{folder / INDEX}: names {name!r}, which is no file of the folder; mend the index"
        )
    if not _is(path, Path.is_file):
        raise PipelineError(f"{path}: is named by the index but missing; fetch it again")
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the Hub cache links its snapshots to ../../blobs
        allowed.append(home.parent.parent / "blobs")
    if path.resolve().parent not in allowed:
        raise PipelineError(f"{path}: is a link out of the model folder; put the file itself there")
    return path


def _refuse(constant: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(constant)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, from its header alone.

    Raises
    ------
    PipelineError
        If the file is truncated, or header and data do not agree byte for byte.
    """
    mend = "fetch the file again"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length == 0 or length > min(MAX_HEADER, size - 8):
            raise PipelineError(f"{path}: is truncated or no safetensors file; {mend}")
        try:
            text = file.read(length).decode("utf-8")
            header = json.loads(text, parse_constant=_refuse)
            json.dumps(header, ensure_ascii=False).encode()  # refuses half characters
        except (ValueError, RecursionError):
            raise PipelineError(f"{path}: has a damaged header; {mend}") from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else []
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise PipelineError(f"{path}: has a damaged header; {mend}")
    found: dict[str, TensorInfo] = {}
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            nbytes = math.prod(shape) * DTYPE_BYTES[dtype] if sound else None
        except (KeyError, TypeError, ValueError):
            raise PipelineError(f"{path}: has a damaged entry for {name}; {mend}") from None
        if nbytes is None or end - begin != nbytes:
            raise PipelineError(f"{path}: {name} has a shape that does not fit its bytes; {mend}")
        found[name] = TensorInfo(dtype, shape, nbytes, path.name, 8 + length + begin)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise PipelineError(f"{path}: has tensors that overlap or leave a gap; {mend}")
        position = end
    if 8 + length + position != size:
        raise PipelineError(
            f"{path}: has {size} bytes, its header says {8 + length + position}; {mend}"
        )
    return found


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Return all tensors of a model folder by stored name, from headers alone.

    Raises
    ------
    PipelineError
        If a file is damaged, a tensor is stored twice, or index and files disagree.
    """
    found: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in found:
                raise PipelineError(
                    f"{path}: holds {name}, which {found[name].file} holds too; remove one"
                )
            found[name] = tensor
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX, "fetch it again")["weight_map"]
        for name, tensor in found.items():
            if weight_map.get(name) != tensor.file:
                raise PipelineError(
                    f"{folder / INDEX}: does not name {tensor.file} for {name}; mend the index"
                )
        for name in weight_map:
            if name not in found:
                raise PipelineError(
                    f"{folder / INDEX}: names {name}, which no file holds; fetch the folder again"
                )
    return found


def model_files(folder: Path) -> Iterator[Path]:
    """Yield the files that make up a model: weights, configs and tokenizer, in name order."""
    kept = (".json", ".txt", ".jinja", ".safetensors", ".py")
    yield from sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in kept)


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
    PipelineError
        If a file was added, removed or changed since `inspect` ran.
    """
    now = {path.name: fingerprint(path) for path in model_files(folder)}
    for name in sorted(files.keys() | now.keys()):
        if files.get(name) != now.get(name):
            raise PipelineError(
                f"{folder / name}: changed since it was inspected; run `dvc repro -f inspect`"
            )


def read_used_headers(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a model folder by published name, unused ones left out."""
    return {
        published_name(stored): tensor
        for stored, tensor in read_headers(folder).items()
        if not is_unused(stored)
    }
