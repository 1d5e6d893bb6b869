"""8-bit activations against arithmetic by hand and in float64."""

import pytest
import torch

from colqwen3.serving import int8


def test_the_largest_of_each_token_becomes_127() -> None:
    x = torch.tensor([[1.0, -2.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 127.0, -0.5, 1.5]])
    actual = int8.quantize_tokens(x)
    # 127 / 2 x (1, -2, .25): 63.5 and 15.875, halves to the even one
    assert actual.codes.tolist() == [[64, -127, 16, 0], [0, 0, 0, 0], [3, 127, 0, 2]]
    torch.testing.assert_close(actual.scales, torch.tensor([2 / 127, 1e-8 / 127, 1.0]))


def test_a_rotation_is_the_hadamard_matrix_and_its_own_inverse() -> None:
    bits = torch.arange(16)[:, None] & torch.arange(16)
    odd = torch.stack([bits >> place & 1 for place in range(4)]).sum(0) % 2
    hadamard = (1 - 2 * odd).double() / 4
    x = torch.randn(3, 48)
    expected = (x.double().view(3, 3, 16) @ hadamard).flatten(1)
    torch.testing.assert_close(int8.rotate(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(int8.rotate(int8.rotate(x)), x)


@pytest.mark.parametrize("rows", [7, 24])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_rotated_weight_is_off_by_half_a_step_at_most(
    bits: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "ROWS", rows)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 64))
    scales = (torch.rand(2, 24) - 0.5) * 0.02
    weight = int8.rotate(codes * scales.T.repeat_interleave(32, 1))
    actual = int8.rotate_into_int8(codes, scales)
    assert actual.codes.abs().amax(-1).eq(127).all()
    off = (actual.codes * actual.scales[:, None] - weight).abs() / actual.scales[:, None]
    assert off.max() < 0.501


def test_nan_stays_visible() -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    tokens = int8.quantize_tokens(x)
    weight = int8.quantize_weight(torch.eye(2))
    assert int8.multiply(tokens, weight, torch.float32).isnan().all(-1).tolist() == [True, False]


def test_the_group_with_the_furthest_scale_keeps_its_codes() -> None:
    codes = torch.tensor([[-8, 7, 3, -1], [5, -8, 1, 0], [1, -8, 2, -8]])
    # two groups of two inputs; of the last output they are as far from zero, on either side
    scales = torch.tensor([[-0.5, -0.25, 0.5], [0.125, 1.0, -0.5]])
    actual = int8.express_in_int8(codes, scales, 4)
    assert actual.scales.tolist() == [-0.5 / 16, 1 / 16, 0.5 / 16]
    # codes x 16 x (1, -1/4), (-1/4, 1), (1, -1); 128 is beyond int8
    expected = [[-128, 112, -12, 4], [-20, 32, 16, 0], [16, -128, -32, 127]]
    assert actual.codes.tolist() == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_off_by_half_a_step_at_most(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 64))
    scales = (torch.rand(4, 24) - 0.5) * 0.02
    weight = codes * scales.T.repeat_interleave(16, 1)
    actual = int8.express_in_int8(codes, scales, bits)
    off = (actual.codes * actual.scales[:, None] - weight).abs() / actual.scales[:, None]
    off[actual.codes == 127] -= 1  # what 128 becomes
    assert off.max() < 0.5 + 128 * 2**-11  # ratios have eleven bits


def test_the_product_is_that_of_the_rounded_values() -> None:
    tokens = int8.quantize_tokens(torch.randn(5, 96))
    weight = int8.quantize_weight(torch.randn(7, 96))
    x = tokens.codes.double() * tokens.scales.double()[:, None]
    w = weight.codes.double() * weight.scales.double()[:, None]
    actual = int8.multiply(tokens, weight, torch.float32)
    torch.testing.assert_close(actual.double(), x @ w.T, rtol=1e-5, atol=1e-7)
