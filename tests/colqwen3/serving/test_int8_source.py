"""The CUDA kernels for 8-bit activations, run on a CPU, against plain torch."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from colqwen3.serving import fused, int8
from tests.helpers.cuda_on_cpu import COMPILER, CudaOnCpu

SOURCE = Path("colqwen3/serving/int8.cu")
ROW = "const uint4*"
if COMPILER is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> CudaOnCpu:
    return CudaOnCpu(SOURCE, tmp_path_factory.mktemp("kernels"))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def made(tokens: int, features: int) -> int8.Int8Tokens:
    codes = torch.full((tokens, features), 99, dtype=torch.int8)
    return int8.Int8Tokens(codes, torch.zeros(tokens))


def layout(features: int) -> tuple[int, int]:
    """Return vectors and threads of a program, as `int8_kernels` chooses them."""
    vectors = features // 8
    each = -(-vectors // 256)
    return each, -(-vectors // (each * 32)) * 32


def check(actual: int8.Int8Tokens, expected: torch.Tensor) -> None:
    rounded = int8.quantize_tokens(expected)
    torch.testing.assert_close(actual.scales, rounded.scales, rtol=0.005, atol=0)
    off = (actual.codes.float() - expected.float() / rounded.scales[:, None]).abs()
    assert off.max() < 1.2
    assert off.mean() < 0.3


@pytest.mark.parametrize("features", [64, 640, 2560])
def test_tokens_are_rounded(cuda: CudaOnCpu, features: int) -> None:
    x, actual, (each, threads) = draw(3, features), made(3, features), layout(features)
    x[1, 5] = float("nan")
    cuda.run(f"quantize<{each}>", f"{ROW}, s8*, float*, int", (3, 1), threads,
             x, *actual, features // 8)  # fmt: skip
    expected = int8.quantize_tokens(x)
    torch.testing.assert_close(actual.scales, expected.scales, equal_nan=True)
    assert torch.equal(actual.codes[::2], expected.codes[::2])


@pytest.mark.parametrize("features", [64, 2176])
def test_a_gate_is_rotated_and_rounded(cuda: CudaOnCpu, features: int) -> None:
    x, actual, (each, threads) = draw(3, 2 * features), made(3, features), layout(features)
    cuda.run(f"gate<{each}>", f"{ROW}, s8*, float*, int", (3, 1), threads,
             x, *actual, features // 8)  # fmt: skip
    first, second = x.float().chunk(2, -1)
    check(actual, int8.rotate(functional.silu(first) * second))


@pytest.mark.parametrize("features", [64, 2560])
@pytest.mark.parametrize("adds", [False, True])
def test_a_norm_is_rounded(cuda: CudaOnCpu, features: int, adds: bool) -> None:
    x, change, weight = draw(3, features), draw(3, features), draw(features)
    actual, total, (each, threads) = made(3, features), torch.zeros_like(x), layout(features)
    types = f"{ROW}, {ROW}, {ROW}, uint4*, s8*, float*, float, int"
    more = (change, weight, total) if adds else (None, weight, None)
    cuda.run(f"add_norm<{each}>", types, (3, 1), threads,
             x, *more, *actual, 1e-6, features // 8)  # fmt: skip
    if adds:
        assert torch.equal(total, x + change)
    check(actual, fused.rms_norm(x + change if adds else x, weight, 1e-6))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_4_bit_weights_become_int8(cuda: CudaOnCpu, group_size: int, rotated: bool) -> None:
    outputs, padded, inputs = 100, 128, 256
    codes = torch.randint(-8, 8, (padded, inputs))
    scales = ((torch.rand(inputs // group_size, padded) - 0.5) * 0.02).bfloat16()
    turned, plain = int8.rotate_into_int8(codes, scales), int8.express_in_int8(codes, scales, 4)
    expected = turned if rotated else plain
    actual = torch.full((outputs, inputs), 99, dtype=torch.int8)
    words, placed = as_humming(codes, scales)
    cuda.run(f"unpack<{group_size}, {int(rotated)}>", f"{ROW}, const u16*, const float*, s8*, int, int, int",
             (inputs // 128, padded // 64), 128,
             words, placed, 1 / expected.scales, actual, outputs, padded, inputs)  # fmt: skip
    assert torch.equal(actual, expected.codes[:outputs])


def as_humming(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack codes [outputs, inputs] and scales [groups, outputs] as humming does for 16 bits.

    That an H100 with humming 0.1.19 has this layout, `test_int8_kernels` checks there.
    """
    outputs, inputs = codes.shape
    # output: 64, 16, 8, lane / 4; input: 16, 8, lane % 4, 2
    parts = (codes + 8).view(outputs // 64, 4, 2, 8, inputs // 16, 2, 4, 2)
    # nibble: input of two, output of 8, input of 8
    parts = parts.permute(4, 0, 3, 6, 1, 7, 2, 5).reshape(inputs // 16, -1, 8)
    words = (parts.long() << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    placed = scales.view(len(scales), outputs // 64, 8, 8).transpose(2, 3).contiguous()
    return words.contiguous(), placed.view(len(scales), outputs)
