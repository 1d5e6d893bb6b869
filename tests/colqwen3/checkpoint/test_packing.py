"""Dequantization against plain integers packed bit by bit, and against auto-round's own layer."""

import numpy as np
import pytest
import torch

from colqwen3.checkpoint import packing
from colqwen3.checkpoint.packing import dequantize


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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_stores_a_stream_of_bits(bits: int) -> None:
    rng = np.random.default_rng(bits)
    most = 2 ** (bits - 1)
    codes = rng.integers(-most, most, (96, 64))
    scales = rng.normal(size=(96, 2)).astype(np.float16)
    found = packing.pack(torch.from_numpy(codes).to(torch.int8), torch.from_numpy(scales), bits)
    np.testing.assert_array_equal(found["qweight"].numpy(), pack(codes + most, bits).T)
    zeros = np.full((2, 96), most - 1)
    np.testing.assert_array_equal(found["qzeros"].numpy(), pack(zeros, bits))
    np.testing.assert_array_equal(found["scales"].numpy(), scales.T)
    dense = dequantize(**found, bits=bits).numpy()
    wanted = codes.reshape(96, 2, 32) * scales.astype(np.float32)[..., None]
    np.testing.assert_array_equal(dense, wanted.reshape(96, 64).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_equals_the_librarys(bits: int, dtype: torch.dtype) -> None:
    from auto_round.data_type.int import quant_tensor_rtn_sym

    generator = torch.Generator().manual_seed(bits)
    weight = (torch.randn(300, 256, generator=generator) * 0.02).to(dtype)
    weight[0, :64] = 0  # a group of zeros
    weight[1, 0] = -weight[1, :64].abs().max() * 2  # the largest magnitude is negative
    weight[2, 0], weight[2, 1] = -0.25, 0.25  # a tie
    weight[3, :64] *= 1e-4  # a scale below the smallest
    dense, scale, _ = quant_tensor_rtn_sym(weight.float(), bits=bits, group_size=64)
    codes, scales = packing.round_to_nearest(weight, bits, 64)
    assert torch.equal(scales, scale.view(300, 4))
    step = scales.float().repeat_interleave(64, dim=1)
    assert torch.equal(codes.float() * step, dense)
    assert scales[2, 0] < 0 < scales[1, 0]


def test_codes_of_a_rounded_weight_are_found_again() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    codes, scales = packing.round_to_nearest(weight, 4, 32)
    rounded = codes.float() * scales.float().repeat_interleave(32, dim=1)
    for stored, most in ((rounded, 1e-5), (rounded.bfloat16(), 0.05)):
        found, gap = packing.restore_codes(stored, scales, 4)
        assert torch.equal(found, codes)
        assert gap < most
    rounded[5, 7] += 0.5 * scales[5, 0].float()
    assert packing.restore_codes(rounded, scales, 4)[1] == pytest.approx(0.5, abs=1e-3)


def test_relative_error_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    codes = torch.tensor([[2, 4], [0, 0]], dtype=torch.int8)
    scales = torch.ones(2, 1, dtype=torch.float16)
    assert packing.relative_error(weight, codes, scales) == pytest.approx(0.2)
