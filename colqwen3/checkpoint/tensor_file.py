"""Reading and writing single tensors of safetensors files, never a whole file in memory.

The library's own writer needs all tensors at once. A checkpoint whose shapes are known beforehand
can be written tensor by tensor, in any order, and be continued after a crash.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch

from colqwen3.checkpoint.headers import DTYPE_BYTES, Spec, TensorInfo
from colqwen3.system.errors import UserError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}
# safetensors puts wide types first, and sorts by name within a type
ORDER = ("I64", "F32", "I32", "BF16", "F16")
CHUNK = 16 << 20
FORMAT = {"format": "pt"}  # transformers expects it in a checkpoint


def read_tensor(folder: Path, tensor: TensorInfo) -> torch.Tensor:
    """Read one tensor of a model folder into memory of its own.

    Raises
    ------
    UserError
        If the file ends before the tensor does.
    """
    buffer = bytearray(tensor.nbytes)
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        if file.readinto(buffer) != tensor.nbytes:
            raise UserError(f"{folder / tensor.file}: is truncated; fetch it again")
    return torch.frombuffer(buffer, dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def read_rows(folder: Path, tensor: TensorInfo, first: int, count: int) -> torch.Tensor:
    """Read `count` rows of one tensor of a model folder, from row `first`.

    Raises
    ------
    UserError
        If the file ends before they do.
    """
    row = tensor.nbytes // tensor.shape[0]
    shape = (count, *tensor.shape[1:])
    start = tensor.start + first * row
    part = TensorInfo(tensor.dtype, shape, count * row, tensor.file, start)
    return read_tensor(folder, part)


def read_chunks(folder: Path, tensor: TensorInfo) -> Iterator[bytes]:
    """Yield the bytes of one tensor of a model folder, some megabytes at a time.

    Raises
    ------
    UserError
        If the file ends before the tensor does.
    """
    left = tensor.nbytes
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise UserError(f"{folder / tensor.file}: is truncated; fetch it again")
            yield chunk
            left -= len(chunk)


def same_bytes(a: Path, first: TensorInfo, b: Path, second: TensorInfo) -> bool:
    """Whether two stored tensors of one size, in folders `a` and `b`, hold the same bytes."""
    pairs = zip(read_chunks(a, first), read_chunks(b, second), strict=True)
    return all(left == right for left, right in pairs)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, in order."""
    # flat first: a last dimension of size 1 counts as contiguous whatever its stride
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


class TensorFile:
    """A safetensors file of known tensors, written one by one in any order.

    The bytes equal those of ``safetensors.torch.save_file`` with the same metadata. A file that is
    already there with the same header is continued, what was written stays.

    Parameters
    ----------
    path
        The file; its disk space is reserved at once, so that a full disk shows here.
    specs
        Name -> (dtype as safetensors names it, shape).
    metadata
        At most one key: the library writes several in an order that changes.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] = FORMAT
    ) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._places: dict[str, tuple[int, int, Spec]] = {}
        position = 0
        for name in sorted(specs, key=lambda name: (ORDER.index(specs[name][0]), name)):
            dtype, shape = specs[name]
            nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
            end = position + nbytes
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            self._places[name] = (position, nbytes, specs[name])
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = struct.pack("<Q", len(text)) + text
        size = len(start) + position
        self._data = len(start)
        known = path.exists() and path.stat().st_size == size
        self._file = path.open("r+b" if known else "w+b")
        if not known or self._file.read(len(start)) != start:
            self._file.truncate(0)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:
                self._file.truncate(size)
            self._file.seek(0)
            self._file.write(start)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises
        ------
        ValueError
            If its dtype or shape differs from its spec.
        """
        start, _, (dtype, shape) = self._places[name]
        if tensor.dtype != DTYPES[dtype] or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} differs from its spec")
        self._write(self._data + start, raw_bytes(tensor))

    def write_rows(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Write some rows of one tensor, from row `first`.

        Raises
        ------
        ValueError
            If their dtype or shape does not fit the spec.
        """
        start, nbytes, (dtype, shape) = self._places[name]
        fits = first + len(rows) <= shape[0] and tuple(rows.shape[1:]) == shape[1:]
        if rows.dtype != DTYPES[dtype] or not fits:
            raise ValueError(f"{name}: {rows.dtype} {list(rows.shape)} does not fit its spec")
        place = self._data + start + first * (nbytes // shape[0])
        self._write(place, raw_bytes(rows))

    def _write(self, place: int, data: memoryview | bytes) -> None:
        """Write at a place, without moving any file position: threads may write at once."""
        rest = memoryview(data)
        while rest:
            count = os.pwrite(self._file.fileno(), rest[:CHUNK], place)
            rest, place = rest[count:], place + count

    def copy(self, name: str, folder: Path, tensor: TensorInfo) -> None:
        """Copy the bytes of a stored tensor of the same dtype and shape.

        Raises
        ------
        ValueError
            If dtype or shape differs from the spec.
        UserError
            If the source file ends before the tensor does.
        """
        start, _, spec = self._places[name]
        if spec != (tensor.dtype, tensor.shape):
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} differs from its spec")
        place = self._data + start
        for chunk in read_chunks(folder, tensor):
            self._write(place, chunk)
            place += len(chunk)

    def read(self, name: str) -> bytes:
        """Return the bytes of one tensor in the file."""
        start, nbytes, _ = self._places[name]
        return os.pread(self._file.fileno(), nbytes, self._data + start)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor in the file."""
        dtype, shape = self._places[name][2]
        return torch.frombuffer(bytearray(self.read(name)), dtype=DTYPES[dtype]).view(shape)


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of a folder's safetensors files by name, each read when it is asked for.

    Parameters
    ----------
    folder
        Where the files lie.
    tensors
        Name -> entry of a header, as `read_header` returns it.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._folder, self._tensors = folder, dict(tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, from the header alone."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._folder, self._tensors[name])

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
