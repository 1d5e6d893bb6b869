"""Finding a model folder, and reading its safetensors headers without its weights.

The header format is that of the safetensors library: eight bytes of little-endian length, then
JSON of name -> dtype, shape and data offsets, then the data without gaps. The library's own
reader maps the whole file; the standard library reads nine gigabytes of headers in milliseconds.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from colqwen3.checkpoint.layout import is_unused, published_name
from colqwen3.system.errors import UserError
from colqwen3.system.files import path_is, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # the safetensors library's own limit
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


Spec = tuple[str, tuple[int, ...]]
"""Dtype as safetensors names it, and shape."""


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header; its data start at byte `start` of `file`."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    start: int


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, from its index or the single file.

    Raises
    ------
    UserError
        If there are none, the index is damaged, or it names a file outside the folder.
    """
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, "fetch it again")
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX}: has no weight_map; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{folder}: contains only pickled weights, which are never read; convert them to safetensors"
        )
    else:
        raise UserError(
            f"{folder}: contains neither {INDEX} nor {SINGLE}; give a complete model folder"
        )
    return [_inside(folder, name) for name in names]


def _inside(folder: Path, name: str) -> Path:
    """Return ``folder / name`` if it is a plain file of that folder."""
    path = folder / name
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise UserError(
            f"{folder / INDEX}: names {name!r}, which is not a file of the folder; fix the index"
        )
    if not path_is(path, Path.is_file):
        raise UserError(f"{path}: is named by the index but missing; fetch it again")
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the Hub cache links its snapshots to ../../blobs
        allowed.append(home.parent.parent / "blobs")
    if path.resolve().parent not in allowed:
        raise UserError(f"{path}: is a link to outside the model folder; put the file itself there")
    return path


def _refuse(constant: str) -> None:
    """Reject NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(constant)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, from its header alone.

    Raises
    ------
    UserError
        If the file is truncated, or header and data do not agree byte for byte.
    """
    fix = "fetch the file again"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length == 0 or length > min(MAX_HEADER, size - 8):
            raise UserError(f"{path}: is truncated or not a safetensors file; {fix}")
        try:
            text = file.read(length).decode("utf-8")
            header = json.loads(text, parse_constant=_refuse)
            json.dumps(header, ensure_ascii=False).encode()  # rejects unpaired surrogates
        except (ValueError, RecursionError):
            raise UserError(f"{path}: has a damaged header; {fix}") from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else []
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise UserError(f"{path}: has a damaged header; {fix}")
    tensors: dict[str, TensorInfo] = {}
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            valid = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            nbytes = math.prod(shape) * DTYPE_BYTES[dtype] if valid else None
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: has a damaged entry for {name}; {fix}") from None
        if nbytes is None or end - begin != nbytes:
            raise UserError(f"{path}: {name} has a shape that does not fit its bytes; {fix}")
        tensors[name] = TensorInfo(dtype, shape, nbytes, path.name, 8 + length + begin)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise UserError(f"{path}: has tensors that overlap or leave a gap; {fix}")
        position = end
    if 8 + length + position != size:
        raise UserError(f"{path}: has {size} bytes, its header says {8 + length + position}; {fix}")
    return tensors


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Return all tensors of a model folder by stored name, from headers alone.

    Raises
    ------
    UserError
        If a file is damaged, a tensor is stored twice, under one name or two, or index and files
        disagree.
    """
    tensors: dict[str, TensorInfo] = {}
    published: dict[str, str] = {}
    for path in weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise UserError(
                    f"{path}: contains {name}, which {tensors[name].file} contains too; remove one"
                )
            tensors[name] = tensor
            other = published.setdefault(published_name(name), name)
            if other != name:
                raise UserError(
                    f"{path}: {name} and {other} are one tensor, stored under two names; remove one"
                )
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX, "fetch it again")["weight_map"]
        for name, tensor in tensors.items():
            if weight_map.get(name) != tensor.file:
                raise UserError(
                    f"{folder / INDEX}: does not name {tensor.file} for {name}; fix the index"
                )
        for name in weight_map:
            if name not in tensors:
                raise UserError(
                    f"{folder / INDEX}: names {name}, which no file contains; fetch the folder again"
                )
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """A model folder and its tensors by published name, unused ones left out."""

    folder: Path
    tensors: dict[str, TensorInfo]

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Read the headers of a model folder.

        Raises
        ------
        UserError
            See `read_headers`.
        """
        return cls(
            folder,
            {
                published_name(stored): tensor
                for stored, tensor in read_headers(folder).items()
                if not is_unused(stored)
            },
        )
