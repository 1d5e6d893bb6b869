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


def test_each_segment_has_a_scale() -> None:
    x = torch.randn(3, 200)
    x[1, 150] = 1000.0
    actual = int8.quantize_segments(x)
    first, second = int8.quantize_tokens(x[:, :128]), int8.quantize_tokens(x[:, 128:])
    assert torch.equal(actual.codes, torch.cat([first.codes, second.codes], 1))
    assert torch.equal(actual.scales, torch.stack([first.scales, second.scales], 1))
    weight = int8.quantize_weight(torch.randn(7, 200))
    values = actual.codes.double() * actual.scales.double().repeat_interleave(128, 1)[:, :200]
    expected = values @ (weight.codes.double() * weight.scales.double()[:, None]).T
    product = int8.multiply(actual, weight, torch.float32)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-5)


def test_nan_stays_visible() -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    tokens = int8.quantize_tokens(x)
    weight = int8.quantize_weight(torch.eye(2))
    assert int8.multiply(tokens, weight, torch.float32).isnan().all(-1).tolist() == [True, False]


def test_a_group_with_the_largest_scale_keeps_its_codes_to_within_a_step() -> None:
    codes = torch.tensor([[-8, 7, 3, -1], [5, -8, 1, 0]])
    scales = torch.tensor([[0.5, -0.25], [0.125, 1.0]])  # two groups of two inputs
    actual = int8.express_in_int8(codes, scales, 4)
    torch.testing.assert_close(actual.scales, torch.tensor([0.5 * 8 / 127, 8 / 127]))
    # codes x 15.875 x (1, 1/4) of the first output, x (-1/4, 1) of the second
    assert actual.codes.tolist() == [[-127, 111, 12, -4], [-20, 32, 16, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_off_by_half_a_step_at_most(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 64))
    scales = (torch.rand(4, 24) - 0.5) * 0.02
    weight = codes * scales.T.repeat_interleave(16, 1)
    actual = int8.express_in_int8(codes, scales, bits)
    off = (actual.codes * actual.scales[:, None] - weight).abs() / actual.scales[:, None]
    assert off.max() < 0.5 + 127 * 2**-11  # ratios have eleven bits


def test_the_product_is_that_of_the_rounded_values() -> None:
    tokens = int8.quantize_tokens(torch.randn(5, 96))
    weight = int8.quantize_weight(torch.randn(7, 96))
    x = tokens.codes.double() * tokens.scales.double()[:, None]
    w = weight.codes.double() * weight.scales.double()[:, None]
    actual = int8.multiply(tokens, weight, torch.float32)
    torch.testing.assert_close(actual.double(), x @ w.T, rtol=1e-5, atol=1e-7)
