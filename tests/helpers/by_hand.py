"""Packed weights read bit by bit with numpy, as the formats describe them: no code of the project."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from colqwen3.checkpoint.layout import EMBEDDINGS

Array = NDArray[Any]


def codes_of(words: Array, bits: int) -> Array:
    """Return the unsigned numbers in rows of 32-bit words, lowest bits first."""
    stream = np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little"
    ).reshape(len(words), -1, bits)
    codes: Array = (stream.astype(np.int64) << np.arange(bits)).sum(-1)
    return codes


def dense_linear(tensors: Mapping[str, torch.Tensor], name: str, bits: int) -> Array:
    """Return the weight [outputs, inputs] of a packed linear; its zero points must be in the middle."""
    qweight, qzeros, scales = (
        tensors[f"{name}.{part}"].numpy() for part in ("qweight", "qzeros", "scales")
    )
    codes = codes_of(qweight.T, bits)
    assert (codes_of(qzeros, bits) == 2 ** (bits - 1) - 1).all()  # stored minus one
    steps = np.repeat(scales.T.astype(np.float32), codes.shape[1] // len(scales), axis=1)
    weight: Array = (codes - 2 ** (bits - 1)).astype(np.float32) * steps
    return weight


def dense_table(tensors: Mapping[str, torch.Tensor], bits: int) -> Array:
    """Return the packed token embeddings [rows, width]."""
    packed, scales = (
        tensors[f"{EMBEDDINGS}.{part}"].numpy() for part in ("weight_packed", "weight_scale")
    )
    codes = codes_of(packed, bits)
    steps = np.repeat(scales.astype(np.float32), codes.shape[1] // scales.shape[1], axis=1)
    weight: Array = (codes - 2 ** (bits - 1)).astype(np.float32) * steps
    return weight


def dense_weights(
    tensors: Mapping[str, torch.Tensor], bits: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Return the weights of quantized modules, whose bits are given, by ``<module>.weight``."""
    return {
        f"{name}.weight": torch.from_numpy(
            dense_table(tensors, width)
            if name == EMBEDDINGS
            else dense_linear(tensors, name, width)
        )
        for name, width in bits.items()
    }
