"""Quantized codes as blocks of llama.cpp's types Q4_0 and Q8_0, bit for bit.

A block holds 32 weights of a row: their float16 scale, then their codes. In Q4_0 byte i is
``(c[i] + 8) | (c[i + 16] + 8) << 4``, in Q8_0 it is ``c[i]``; a weight is scale times code, as in
the checkpoint. Source: ``ggml-common.h`` and ``ggml-quants.c`` of llama.cpp.
"""

from collections.abc import Mapping

import torch

from colqwen3.checkpoint.packing import pack, unpack
from colqwen3.gguf.layout import BLOCK


def unpack_codes(parts: Mapping[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Return the codes of a packed linear.

    Parameters
    ----------
    parts
        ``qweight``, ``qzeros`` and ``scales`` of the ``auto_round`` format.
    bits
        Bits of one weight.

    Returns
    -------
    torch.Tensor
        Int8 [out_features, in_features], from ``-2 ** (bits - 1)``.

    Raises
    ------
    ValueError
        If a zero point is not in the middle, or a scale is not finite: no block holds such a weight.
    """
    scales = parts["scales"]
    groups, out_features = scales.shape
    if not bool(scales.isfinite().all()):
        raise ValueError("has a scale that is NaN or infinite")
    codes = torch.zeros(out_features, BLOCK, dtype=torch.int8)
    symmetric = pack(codes, scales.new_zeros(out_features, groups), bits)["qzeros"]
    if not torch.equal(parts["qzeros"], symmetric):
        raise ValueError("has zero points that are not in the middle (sym: false)")
    return unpack(parts["qweight"], parts["qzeros"], bits).to(torch.int8)


def to_blocks(codes: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the bytes of a linear in Q4_0 or Q8_0.

    Parameters
    ----------
    codes
        Int8 [out_features, in_features], from -8 to 7 for Q4_0.
    scales
        Float16 [groups, out_features], as the checkpoint stores them.
    kind
        ``Q4_0`` or ``Q8_0``.

    Returns
    -------
    torch.Tensor
        Uint8 [out_features, bytes of a row].
    """
    out_features, in_features = codes.shape
    repeated = scales.T.repeat_interleave(in_features // BLOCK // scales.shape[0], dim=1)
    scale_bytes = repeated.contiguous().view(torch.uint8).view(out_features, -1, 2)
    blocks = codes.view(out_features, -1, BLOCK)
    if kind == "Q4_0":
        low, high = (blocks + 8).view(torch.uint8).chunk(2, dim=-1)
        code_bytes = low | high << 4
    else:
        code_bytes = blocks.view(torch.uint8)
    return torch.cat([scale_bytes, code_bytes], dim=-1).flatten(1)
