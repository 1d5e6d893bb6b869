"""The kernels for 8-bit activations against plain torch; on a GPU."""

from typing import Any

import pytest
import torch

from colqwen3.checkpoint.packing import pack
from colqwen3.serving import fused, int8
from colqwen3.serving.linears import humming_or_int8

pytest.importorskip("triton")
pytest.importorskip("humming")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs an H100", allow_module_level=True)

from colqwen3.serving import int8_kernels as kernels

WIDTHS = [64, 2560, 4096, 9728]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def check(actual: int8.Int8Tokens, expected: torch.Tensor) -> None:
    """Compare with the rounding of values that were computed in another order of additions."""
    rounded = int8.quantize_tokens(expected)
    torch.testing.assert_close(actual.scales, rounded.scales, rtol=0.01, atol=0)
    off = (actual.codes.float() - expected.float() / rounded.scales[:, None]).abs()
    assert off.max() < 1.6  # half a step, and a bfloat16 rounding of the largest values


@pytest.mark.parametrize("width", WIDTHS)
def test_tokens_are_rounded(width: int) -> None:
    x = draw(37, width)
    actual, expected = kernels.quantize_tokens(x), int8.quantize_tokens(x)
    torch.testing.assert_close(actual.scales, expected.scales)
    assert (actual.codes.int() - expected.codes.int()).abs().max() <= 1
    assert (actual.codes != expected.codes).float().mean() < 0.001


@pytest.mark.parametrize("width", WIDTHS)
def test_a_gate_and_a_norm_are_rounded(width: int) -> None:
    x, change, weight = draw(37, width), draw(37, width), draw(width)
    both = draw(37, 2 * width)
    check(kernels.gate(both), int8.rotate(fused.gate(both.float())))
    check(kernels.rms_norm(x, weight, 1e-6), fused.rms_norm(x, weight, 1e-6))
    total, normed = kernels.add_rms_norm(x, change, weight, 1e-6)
    assert torch.equal(total, x + change)
    check(normed, fused.rms_norm(x + change, weight, 1e-6))


def test_nan_stays_visible() -> None:
    x = draw(3, 2560)
    x[1, 77] = float("nan")
    assert kernels.quantize_tokens(x).scales.isnan().tolist() == [False, True, False]


def pack_randomly(outputs: int, inputs: int, group_size: int) -> tuple[torch.Tensor, Any]:
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    scales = ((torch.rand(outputs, inputs // group_size) - 0.5) * 0.02).half()
    return codes.cuda(), {key: part.cuda() for key, part in pack(codes, scales, 4).items()}


def in_int8(codes: torch.Tensor, parts: Any, rotated: bool) -> int8.Int8Weight:
    scales = parts["scales"].bfloat16()
    if rotated:
        return int8.rotate_into_int8(codes, scales)
    return int8.express_in_int8(codes, scales, 4)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size", "own_tiles"),
    [
        (64, 128, 128, True),
        (200, 256, 32, True),
        (2560, 4096, 64, True),  # others take long to compile
        (2560, 4096, 128, False),
    ],
)
def test_a_linear_in_hummings_layout(
    outputs: int, inputs: int, group_size: int, own_tiles: bool, rotated: bool
) -> None:
    codes, parts = pack_randomly(outputs, inputs, group_size)
    linear = humming_or_int8(parts, group_size, rotated, own_tiles)
    weight = codes * parts["scales"].bfloat16().float().T.repeat_interleave(group_size, 1)
    expected = in_int8(codes, parts, rotated)
    for tokens in (1, 65, 300):
        x = draw(tokens, inputs)
        rounded = int8.quantize_tokens(int8.rotate(x) if rotated else x)
        sums = rounded.codes.double() @ expected.codes.double().T
        product = sums * rounded.scales.double()[:, None] * expected.scales.double()
        actual = linear(rounded)
        torch.testing.assert_close(actual, product.bfloat16(), rtol=0.008, atol=1e-6)
        exact = x.float() @ weight.T
        assert (actual.float() - exact).norm() < 0.03 * exact.norm()
    # humming's kernel of each number of tokens takes seconds to compile
    assert (linear(x).float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("rotated", [False, True])
def test_unpacked_weights_are_exact(rotated: bool) -> None:
    codes, parts = pack_randomly(192, 384, 128)
    expected = in_int8(codes, parts, rotated)
    identity = int8.Int8Tokens(
        torch.eye(384, dtype=torch.int8, device="cuda"), torch.ones(384, device="cuda")
    )
    actual = humming_or_int8(parts, 128, rotated)(identity)
    assert torch.equal(actual, (expected.codes.T * expected.scales).bfloat16())
