"""Embeddings on disk while a set is embedded: memory stays flat, and a crash loses little."""

from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import save_file

from colqwen3.checkpoint.headers import TensorInfo, read_header
from colqwen3.checkpoint.tensor_file import StoredTensors
from colqwen3.system.files import digest_file
from colqwen3.system.resume import Scratch

PART_ITEMS = 32  # 52 MB of pages of the 4B model


class Parts:
    """Embeddings stored in a scratch as they are computed, some dozens of items per file.

    What an earlier run stored there is not computed again.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._stored: dict[str, TensorInfo] = {}
        self._new: dict[str, torch.Tensor] = {}
        for name in sorted(scratch.files):
            self._stored.update(read_header(scratch.folder / name))

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    def add(self, kind: str, items: Mapping[str, torch.Tensor]) -> None:
        """Add the items of one batch; `kind` is ``query`` or ``page``.

        Batches are stored whole, so that a run that continues forms the same ones.
        """
        self._new.update((f"{kind}/{name}", tensor) for name, tensor in items.items())
        if len(self._new) >= PART_ITEMS:
            self.flush()

    def flush(self) -> None:
        """Store what was added."""
        if not self._new:
            return
        path = self._scratch.folder / f"part-{len(self._scratch.files):05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self._new.items()}, path)
        self._scratch.record({**self._scratch.files, path.name: digest_file(path)})
        self._stored.update(read_header(path))
        self._new = {}

    def of(self, kind: str, names: Iterable[str]) -> Mapping[str, torch.Tensor]:
        """Return stored items by name, each read when it is asked for."""
        return StoredTensors(
            self._scratch.folder, {name: self._stored[f"{kind}/{name}"] for name in names}
        )
