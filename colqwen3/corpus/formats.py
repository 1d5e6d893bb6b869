"""Formats of page vectors: what an index costs in bytes, and what it costs in accuracy.

A vector is a unit vector of a page token. ``int8`` has one scale per vector (its largest absolute
value becomes 127); ``binary`` keeps the signs, against which queries stay 16-bit; ``pool2`` and
``pool3`` replace a page's tokens by half and a third as many cluster means (hierarchical pooling,
Clavié et al., 2024, arXiv:2409.14683, as sentence-transformers implements it).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from colqwen3.system.errors import UserError

Kind = Literal["float32", "float16", "int8", "binary"]
INT8 = 127


@dataclass(frozen=True)
class Format:
    """How the vectors of a page are stored.

    Attributes
    ----------
    kind
        The numbers.
    pool
        About how many tokens become one; 1: none is pooled.
    """

    kind: Kind
    pool: int = 1


FORMATS = {
    "float32": Format("float32"),
    "float16": Format("float16"),
    "int8": Format("int8"),
    "binary": Format("binary"),
    "pool2-float16": Format("float16", 2),
    "pool3-float16": Format("float16", 3),
    "pool2-int8": Format("int8", 2),
    "pool3-int8": Format("int8", 3),
}
"""Every format by its name."""
DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "binary": np.uint8}


@dataclass(frozen=True)
class Encoded:
    """The stored vectors of one page.

    Attributes
    ----------
    values
        [tokens, embed_dim] numbers; for ``binary`` bytes [tokens, embed_dim / 8], the first
        dimension in the highest bit.
    scales
        Float16 [tokens] for ``int8``: what the numbers are multiplied by; None otherwise.
    """

    values: NDArray[np.generic]
    scales: NDArray[np.float16] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the page."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def encode(vectors: torch.Tensor, format_: Format) -> Encoded:
    """Bring the vectors of one page into a format.

    Parameters
    ----------
    vectors
        Unit vectors [tokens, embed_dim] of any float type.
    format_
        One of `FORMATS`.

    Raises
    ------
    UserError
        If a vector is not finite, or the format needs a library that is not installed, or a
        number of dimensions that divides by 8.
    """
    vectors = vectors.float()
    if not torch.isfinite(vectors).all():
        raise UserError("its vectors hold NaN or infinite values; check the model")
    if format_.pool > 1:
        vectors = _pooled(vectors, format_.pool)
    numbers: NDArray[np.float32] = vectors.numpy()
    if format_.kind == "binary":
        if numbers.shape[1] % 8:
            raise UserError(f"binary vectors need dimensions by eights, not {numbers.shape[1]}")
        return Encoded(np.packbits(numbers > 0, axis=1))
    if format_.kind == "int8":
        scales = (np.abs(numbers).max(1) / INT8).astype(np.float16)
        wide = np.maximum(scales.astype(np.float32), np.finfo(np.float32).tiny)[:, None]
        return Encoded(np.clip(np.rint(numbers / wide), -INT8, INT8).astype(np.int8), scales)
    return Encoded(numbers.astype(DTYPES[format_.kind]))


def decode(encoded: Encoded, kind: Kind) -> torch.Tensor:
    """Return the float32 vectors [tokens, embed_dim] that stored ones stand for in a score.

    Those of ``binary`` are signs divided by the root of their number: unit vectors again.
    """
    if kind == "binary":
        bits = np.unpackbits(encoded.values.astype(np.uint8), axis=1).astype(np.float32)
        return torch.from_numpy((2 * bits - 1) / np.sqrt(np.float32(bits.shape[1])))
    numbers = torch.from_numpy(encoded.values.astype(np.float32))
    if encoded.scales is not None:
        numbers *= torch.from_numpy(encoded.scales.astype(np.float32))[:, None]
    return numbers


def _pooled(vectors: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the unit means of clusters of vectors, a `factor`-th as many."""
    try:
        from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
    except ImportError:
        raise UserError(
            "pooled formats need sentence-transformers 6; run `pip install 'sentence-transformers>=6'`"
        ) from None
    pooling = HierarchicalTokenPooling(factor, num_protected_tokens=0)
    pooled: torch.Tensor = pooling.pool_one(vectors)
    return pooled
