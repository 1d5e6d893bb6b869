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
    dense = dequantize(
        torch.from_numpy(pack(q, bits).T.copy()),
        torch.from_numpy(pack(zeros - 1, bits).copy()),
        torch.from_numpy(scales),
        bits,
    )
    expected = np.empty((out_features, in_features), dtype=np.float32)
    for row in range(out_features):
        for column in range(in_features):
            group = column // group_size
            step = np.float32(scales[group, row])
            expected[row, column] = step * np.float32(q[row, column] - zeros[group, row])
    np.testing.assert_array_equal(dense.numpy(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_in_another_order_keep_their_weights(bits: int) -> None:
    rng = np.random.default_rng(bits)
    parts = {
        "qweight": torch.from_numpy(pack(rng.integers(0, 2**bits, (64, 128)), bits).T.copy()),
        "qzeros": torch.from_numpy(pack(rng.integers(0, 2**bits - 1, (2, 64)), bits).copy()),
        "scales": torch.from_numpy(rng.normal(size=(2, 64)).astype(np.float16)),
    }
    order = torch.from_numpy(rng.permutation(64))
    moved = packing.reorder_outputs(parts, order, bits)
    expected = dequantize(**parts, bits=bits)[order]
    assert torch.equal(dequantize(**moved, bits=bits), expected)
    assert not torch.equal(expected, dequantize(**parts, bits=bits))


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
    expected = layer(torch.eye(128, dtype=torch.float32)).T
    dense = dequantize(layer.qweight, layer.qzeros, layer.scales, bits)
    torch.testing.assert_close(dense, expected.float(), atol=2**-8 * 2**bits, rtol=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_stores_a_stream_of_bits(bits: int) -> None:
    rng = np.random.default_rng(bits)
    most = 2 ** (bits - 1)
    codes = rng.integers(-most, most, (96, 64))
    scales = rng.normal(size=(96, 2)).astype(np.float16)
    actual = packing.pack(torch.from_numpy(codes).to(torch.int8), torch.from_numpy(scales), bits)
    np.testing.assert_array_equal(actual["qweight"].numpy(), pack(codes + most, bits).T)
    zeros = np.full((2, 96), most - 1)
    np.testing.assert_array_equal(actual["qzeros"].numpy(), pack(zeros, bits))
    np.testing.assert_array_equal(actual["scales"].numpy(), scales.T)
    dense = dequantize(**actual, bits=bits).numpy()
    expected = codes.reshape(96, 2, 32) * scales.astype(np.float32)[..., None]
    np.testing.assert_array_equal(dense, expected.reshape(96, 64).astype(np.float32))


def test_three_bits_by_hand() -> None:
    """32 values fill three words: 0..7 four times is the octal number 76543210 repeated."""
    codes = (torch.arange(32) % 8 - 4).to(torch.int8).repeat(32, 1)
    packed = packing.pack(codes, torch.ones(32, 1, dtype=torch.float16), 3)
    stream = sum(int("76543210", 8) << 24 * eight for eight in range(4))
    words = [(stream >> 32 * word & 0xFFFFFFFF) for word in range(3)]
    assert [word & 0xFFFFFFFF for word in packed["qweight"][:, 5].tolist()] == words
    assert torch.equal(dequantize(**packed, bits=3), codes.float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_gives_the_codes_that_were_packed(bits: int) -> None:
    most = 2 ** (bits - 1)
    every = torch.arange(-most, most, dtype=torch.int16).repeat(64 * 64)[: 64 * 96].view(96, 64)
    packed = packing.pack(every.to(torch.int8), torch.ones(96, 2, dtype=torch.float16), bits)
    assert torch.equal(packing.unpack(packed["qweight"], packed["qzeros"], bits), every)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_has_the_bits_of_the_library(bits: int) -> None:
    from auto_round.utils.bit_packing import pack_bitstream

    generator = torch.Generator().manual_seed(bits)
    most = 2 ** (bits - 1)
    codes = torch.randint(-most, most, (96, 64), generator=generator).to(torch.int8)
    packed = packing.pack(codes, torch.ones(96, 2, dtype=torch.float16), bits)
    assert torch.equal(packed["qweight"], pack_bitstream(codes + most, bits, dim=1).T)
    zeros = torch.full((2, 96), most - 1)
    assert torch.equal(packed["qzeros"], pack_bitstream(zeros, bits, dim=1))


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
        actual, gap = packing.restore_codes(stored, scales, 4)
        assert torch.equal(actual, codes)
        assert gap < most
    rounded[5, 7] += 0.5 * scales[5, 0].float()
    assert packing.restore_codes(rounded, scales, 4)[1] == pytest.approx(0.5, abs=1e-3)


def test_codes_of_eight_bits_are_found_in_a_weight_rounded_to_bfloat16() -> None:
    """Rounding moves 127 scales by up to half a scale, which is no sign of a wrong code."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    codes, scales = packing.round_to_nearest(weight, 8, 32)
    rounded = packing.dense_weight(codes, scales).bfloat16()
    steps = rounded.float().view(64, 4, 32) / scales.float().unsqueeze(-1)
    assert (steps - steps.round()).abs().max() > 0.3
    actual, gap = packing.restore_codes(rounded, scales, 8)
    assert torch.equal(actual, codes)
    assert gap < 0.02
    rounded[5, :32] += 0.3 * scales[5, 0]  # small codes, which rounding leaves in place
    assert packing.restore_codes(rounded, scales, 8)[1] > 0.1


def test_relative_error_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    codes = torch.tensor([[2, 4], [0, 0]], dtype=torch.int8)
    scales = torch.ones(2, 1, dtype=torch.float16)
    assert packing.relative_error(weight, codes, scales) == pytest.approx(0.2)


def test_relative_error_of_more_rows_than_are_taken_at_a_time() -> None:
    """600 rows that each err differently: a chunk left out or counted twice changes the sum."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-8, 8, (600, 64), generator=generator).to(torch.int8)
    scales = torch.rand(600, 2, generator=generator).half()
    dense = codes.double() * scales.double().repeat_interleave(32, dim=1)
    noise = torch.randn(600, 64, generator=generator) * torch.arange(600).unsqueeze(1) / 600
    weight = (dense + noise).float()
    expected = float((dense - weight.double()).norm() / weight.double().norm())
    assert packing.relative_error(weight, codes, scales) == pytest.approx(expected, rel=1e-5)
    for start, end in ((0, 256), (256, 512), (512, 600)):  # each chunk counts
        changed = codes.clone()
        changed[start:end] = 0
        assert packing.relative_error(weight, changed, scales) != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_restored_codes_stay_within_their_range(bits: int) -> None:
    """A weight beyond the range gives the last code and its distance, never a code that wraps."""
    most = 2 ** (bits - 1)
    steps = torch.zeros(32, 32)
    steps[0, :4] = torch.tensor([-most - 1.0, float(-most), most - 1.0, float(most)])
    scales = torch.full((32, 1), 0.5, dtype=torch.float16)
    codes, gap = packing.restore_codes(steps * 0.5, scales, bits)
    assert codes[0, :4].tolist() == [-most, -most, most - 1, most - 1]
    assert gap == pytest.approx(1, abs=1e-5)
    steps[0, 3] = most + 2  # farther above the range than below it
    assert packing.restore_codes(steps * 0.5, scales, bits)[1] == pytest.approx(3, abs=1e-5)
    # one too many on one end alone
    assert packing.restore_codes(steps.clamp(min=0) * 0.5, scales, bits)[0][0, 3] == most - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_leaves_the_weight_as_it_is(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    original = weight.clone()
    packing.round_to_nearest(weight, 4, 128)
    assert torch.equal(weight, original)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_rounds_to_the_same_bits(dtype: torch.dtype) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :128] = 0
    weight[1, :128] = torch.tensor([1.0, -1.0]).repeat(64)
    for bits, group_size in ((4, 128), (3, 32)):
        expected = packing.round_to_nearest(weight, bits, group_size)
        actual = packing.round_to_nearest(weight.cuda(), bits, group_size)
        assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))
