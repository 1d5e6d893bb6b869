"""Blocks hold the checkpoint's own weights, decoded here by hand as llama.cpp's source describes them."""

import struct
from collections.abc import Callable

import pytest
import torch

from colqwen3.checkpoint.packing import dequantize, pack, round_to_nearest
from colqwen3.gguf.blocks import to_blocks, unpack_codes


def decode_q4_0(data: bytes) -> list[float]:
    """ggml's ``block_q4_0``: a half, then 16 bytes whose low nibbles come first."""
    (scale,) = struct.unpack("<e", data[:2])
    low, high = [byte & 15 for byte in data[2:]], [byte >> 4 for byte in data[2:]]
    return [scale * (code - 8) for code in [*low, *high]]


def decode_q8_0(data: bytes) -> list[float]:
    """ggml's ``block_q8_0``: a half, then 32 signed bytes."""
    scale, *codes = struct.unpack("<e32b", data)
    return [scale * code for code in codes]


DECODERS: dict[str, tuple[Callable[[bytes], list[float]], int]] = {
    "Q4_0": (decode_q4_0, 18),
    "Q8_0": (decode_q8_0, 34),
}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("bits", "kind"), [(3, "Q4_0"), (4, "Q4_0"), (8, "Q8_0")])
def test_blocks_decode_to_the_weights_of_the_checkpoint(
    bits: int, kind: str, group_size: int
) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 256, generator=generator)
    weight[3, :40] = 0
    parts = pack(*round_to_nearest(weight, bits, group_size), bits)
    assert (parts["scales"] < 0).any()
    assert (parts["scales"] > 0).any()
    codes = unpack_codes(parts, bits)
    assert (int(codes.min()), int(codes.max())) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    data = to_blocks(codes, parts["scales"], kind)
    decode, size = DECODERS[kind]
    assert data.shape == (64, 256 // 32 * size)
    rows = [
        [value for start in range(0, len(row), size) for value in decode(row[start : start + size])]
        for row in (bytes(row.tolist()) for row in data)
    ]
    expected = dequantize(parts["qweight"], parts["qzeros"], parts["scales"], bits)
    # -0.0 and 0.0 differ, too
    assert torch.equal(torch.tensor(rows).view(torch.int32), expected.view(torch.int32))


def test_what_no_block_can_hold_is_refused() -> None:
    parts = pack(*round_to_nearest(torch.randn(32, 64), 4, 32), 4)
    zeros = parts["qzeros"].clone()
    zeros[1, 2] ^= 1
    with pytest.raises(ValueError, match=r"zero points that are not in the middle"):
        unpack_codes({**parts, "qzeros": zeros}, 4)
    scales = parts["scales"].clone()
    scales[0, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        unpack_codes({**parts, "scales": scales}, 4)
