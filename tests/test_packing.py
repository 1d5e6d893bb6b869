"""Dequantization against plain integers packed bit by bit, and against auto-round's own layer."""

import numpy as np
import pytest
import torch

from stages.packing import dequantize


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack rows of unsigned integers as one little-endian stream of bits a row."""
    planes = (values[..., None] >> np.arange(bits)) & 1
    stream = planes.reshape(len(values), -1).astype(np.uint8)
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantize_equals_arithmetic_by_hand(bits: int, group_size: int) -> None:
    rng = np.random.default_rng(bits * group_size)
    out_features, in_features = 64, 256
    groups = in_features // group_size
    q = rng.integers(0, 2**bits, (out_features, in_features))
    zeros = rng.integers(1, 2**bits, (groups, out_features))
    scales = rng.normal(size=(groups, out_features)).astype(np.float16)
    found = dequantize(
        torch.from_numpy(pack(q, bits).T.copy()),
        torch.from_numpy(pack(zeros - 1, bits).copy()),
        torch.from_numpy(scales),
        bits,
    )
    wanted = np.empty((out_features, in_features), dtype=np.float32)
    for row in range(out_features):
        for column in range(in_features):
            group = column // group_size
            step = np.float32(scales[group, row])
            wanted[row, column] = step * np.float32(q[row, column] - zeros[group, row])
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dequantize_equals_the_library_layer(bits: int) -> None:
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    generator = torch.Generator().manual_seed(bits)
    layer = QuantLinear(bits, 64, 128, 96, bias=False)
    for name in ("qweight", "qzeros"):
        buffer = getattr(layer, name)
        word = torch.randint(-(2**31), 2**31, buffer.shape, generator=generator)
        setattr(layer, name, word.to(torch.int32))
    # a stored zero point of all ones means 2**bits, beyond what the symmetric format holds
    layer.qzeros &= 0x55555555
    layer.scales = torch.rand(layer.scales.shape, generator=generator).half()
    wanted = layer(torch.eye(128, dtype=torch.float32)).T
    found = dequantize(layer.qweight, layer.qzeros, layer.scales, bits)
    torch.testing.assert_close(found, wanted.float(), atol=2**-8 * 2**bits, rtol=2e-3)
