"""The CUDA kernels for 8-bit activations, run on a CPU as they are launched, against plain torch."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from colqwen3.serving import fused, int8
from tests.helpers.cuda_on_cpu import COMPILER, CudaOnCpu

MODULE = "colqwen3.serving.int8_kernels"
GPU_ONLY = (
    "humming", "humming.jit", "humming.jit.runtime", "cuda", "cuda.bindings",
    "triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor",
)  # fmt: skip
ROWS = "const uint4*, s8*, float*, int"
PARAMETERS = {
    "quantize": ROWS,
    "gate": ROWS,
    "add_norm": "const uint4*, const uint4*, const uint4*, uint4*, s8*, float*, float, int",
    "unpack": "const uint4*, const u16*, const float*, s8*, int, int, int",
}
if COMPILER is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> CudaOnCpu:
    return CudaOnCpu(Path("colqwen3/serving/int8.cu"), tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def kernels(cuda: CudaOnCpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`int8_kernels` without a GPU: what it launches runs on the CPU."""
    for name in GPU_ONLY:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setattr(sys.modules["humming.jit.runtime"], "KernelRuntime", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module = importlib.import_module(MODULE)

    def kernel(name: str, arguments: tuple[int, ...], device: int) -> Callable[..., None]:
        template = f"{name}<{', '.join(map(str, map(int, arguments)))}>"
        return lambda grid, threads, *values: cuda.run(
            template, PARAMETERS[name], grid, threads, *values
        )

    monkeypatch.setattr(module, "_kernel", kernel)
    yield module
    del sys.modules[MODULE]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def check(actual: int8.Int8Tokens, expected: torch.Tensor) -> None:
    rounded = int8.quantize_tokens(expected)
    torch.testing.assert_close(actual.scales, rounded.scales, rtol=0.005, atol=0)
    off = (actual.codes.float() - expected.float() / rounded.scales[:, None]).abs()
    assert off.max() < 1.2
    assert off.mean() < 0.3


@pytest.mark.parametrize("features", [64, 640, 2560])
def test_tokens_are_rounded(kernels: Any, features: int) -> None:
    x = draw(3, features)
    x[1, 5] = float("nan")
    actual, expected = kernels.quantize_tokens(x), int8.quantize_tokens(x)
    torch.testing.assert_close(actual.scales, expected.scales, equal_nan=True)
    assert torch.equal(actual.codes[::2], expected.codes[::2])


@pytest.mark.parametrize("features", [64, 2176])
def test_a_gate_is_rotated_and_rounded(kernels: Any, features: int) -> None:
    x = draw(3, 2 * features)
    check(kernels.gate(x), int8.rotate(fused.gate(x.float())))


@pytest.mark.parametrize("features", [64, 2560])
def test_norms_are_rounded(kernels: Any, features: int) -> None:
    x, change, weight = draw(3, features), draw(3, features), draw(features)
    check(kernels.rms_norm(x, weight, 1e-6), fused.rms_norm(x, weight, 1e-6))
    total, actual = kernels.add_rms_norm(x, change, weight, 1e-6)
    assert torch.equal(total, x + change)
    check(actual, fused.rms_norm(x + change, weight, 1e-6))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_4_bit_weights_become_int8(kernels: Any, group_size: int, rotated: bool) -> None:
    outputs, padded, inputs = 100, 128, 256
    codes = torch.randint(-8, 8, (padded, inputs))
    scales = ((torch.rand(inputs // group_size, padded) - 0.5) * 0.02).bfloat16()
    turned, plain = int8.rotate_into_int8(codes, scales), int8.express_in_int8(codes, scales, 4)
    expected = turned if rotated else plain
    words, placed = as_humming(codes, scales)
    weight = kernels.PackedWeight(
        words, placed, expected.scales, 1 / expected.scales, rotated, outputs, inputs, group_size
    )
    assert torch.equal(kernels.unpack(weight).codes, expected.codes[:outputs])


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
