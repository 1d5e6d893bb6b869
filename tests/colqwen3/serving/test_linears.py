"""Which kernel serves a packed linear: the one that is there, right, and the faster one."""

import importlib.machinery
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from colqwen3.checkpoint.packing import pack, pack_table
from colqwen3.serving import linears
from colqwen3.serving.linears import Linear, Parts, choose_kernel, dequantized, kernel_error

F32 = torch.float32
NAME = "auto-round-lib"


def parts(inputs: int = 64, outputs: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=generator)
    scales = torch.rand(outputs, inputs // 32, generator=generator).half() + 0.1
    return pack(codes, scales, 4)


def installed(monkeypatch: pytest.MonkeyPatch, make: Callable[..., Linear] | None) -> None:
    """Have auto-round-lib installed as `make`, or not at all."""
    spec = importlib.machinery.ModuleSpec("auto_round_kernel", None) if make else None
    monkeypatch.setattr(linears, "find_spec", lambda _: spec)
    if make:
        monkeypatch.setitem(linears.KERNELS, NAME, make)


def slow(linear: Linear, seconds: float) -> Linear:
    def call(x: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return linear(x)

    return call


def test_without_a_kernel_linears_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    assert choose_kernel(parts(), 4, 32, F32) == "dense"


def test_the_faster_of_two_right_ones_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, lambda *args: slow(dequantized(*args), 0.02))
    assert choose_kernel(parts(), 4, 32, F32) == "dense"
    installed(monkeypatch, dequantized)
    monkeypatch.setattr(linears, "dequantized", lambda *args: slow(dequantized(*args), 0.02))
    assert choose_kernel(parts(), 4, 32, F32) == NAME


def test_a_wrong_kernel_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(result: Parts, *how: Any) -> Linear:
        return dequantized({**result, "scales": result["scales"] * 1.1}, *how)

    installed(monkeypatch, wrong)
    with caplog.at_level(logging.INFO):
        assert choose_kernel(parts(), 4, 32, F32) == "dense"
    assert f"{NAME} is off by 0.1" in caplog.text


def test_a_failing_kernel_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Linear:
        raise OSError("no compiler\nin any folder")

    installed(monkeypatch, fail)
    with caplog.at_level(logging.INFO):
        assert choose_kernel(parts(), 4, 32, F32) == "dense"
    assert f"{NAME} fails (no compiler)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_kept_in_8_bits_computes_what_its_dense_weight_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (32, 64), dtype=torch.int8, generator=generator)
    scales = torch.rand(32, 2, generator=generator).half() - 0.5
    scales[3] = 2.0**-24  # the smallest that there is
    bias, x = (torch.randn(size, generator=generator).to(dtype) for size in ((32,), (5, 64)))
    linear = linears.dequantized_on_use(pack(codes, scales, 8), bias, dtype)
    weight = codes.float() * scales.float().repeat_interleave(32, dim=1)
    expected = torch.nn.functional.linear(x, weight.to(dtype), bias)
    assert torch.equal(linear(x), expected)
    kept = [cell.cell_contents for cell in linear.__closure__ or ()]
    wide = [c for c in kept if isinstance(c, torch.Tensor) and c.numel() == 32 * 64]
    assert [tensor.dtype for tensor in wide] == [torch.int8]


def test_a_scale_of_zero_gives_zeros() -> None:
    codes = torch.zeros(32, 64, dtype=torch.int8)
    scales = torch.zeros(32, 2, dtype=torch.float16)
    linear = linears.dequantized_on_use(pack(codes, scales, 8), torch.ones(32), F32)
    assert torch.equal(linear(torch.ones(2, 64)), torch.ones(2, 32))


def test_linears_side_by_side_give_their_outputs_in_a_row() -> None:
    ways = [linears.dense(torch.full((2, 4), value)) for value in (1.0, 2.0)]
    x = torch.arange(8.0).view(2, 4)
    expected = torch.tensor([[6.0, 6, 12, 12], [22, 22, 44, 44]])
    assert torch.equal(linears.side_by_side(ways)(x), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_embeddings_are_rows_of_the_table(bits: int) -> None:
    generator, half = torch.Generator().manual_seed(0), 2 ** (bits - 1)
    codes = torch.randint(-half, half, (9, 64), generator=generator).to(torch.int8)
    scales = torch.rand(9, 2, generator=generator).half()
    stored = pack_table(codes, scales, bits)
    table = codes.float() * scales.float().repeat_interleave(32, dim=1)
    ids = torch.tensor([[8, 0, 0], [3, 5, 1]])
    for dtype in (torch.float32, torch.bfloat16):
        lookup = linears.packed_embeddings(
            stored["weight_packed"], stored["weight_scale"], bits, dtype
        )
        assert torch.equal(lookup(ids), table[ids].to(dtype))
        assert torch.equal(lookup(ids), linears.dense_embeddings(table.to(dtype))(ids))


def test_error_is_relative_to_the_dequantized_weight() -> None:
    result = parts()
    right = dequantized(result, 4, 32, F32)
    assert kernel_error(right, result, 4, F32) < 1e-6
    assert kernel_error(lambda x: 0.5 * right(x), result, 4, F32) == pytest.approx(0.5, abs=1e-5)
    assert not kernel_error(lambda x: right(x) * torch.nan, result, 4, F32) < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="humming needs a GPU")
@pytest.mark.parametrize("group_size", [32, 128])
def test_humming_is_right_with_each_of_its_tiles(group_size: int) -> None:
    pytest.importorskip("humming")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (512, 768), dtype=torch.int8, generator=generator)
    scales = torch.rand(512, 768 // group_size, generator=generator).half() + 0.1
    packed = {name: part.cuda() for name, part in pack(codes, scales, 4).items()}
    linear = linears.humming(packed, 4, group_size, torch.bfloat16)
    weight = codes.float() * scales.bfloat16().float().repeat_interleave(group_size, dim=1)
    for tokens in (1, 8, 17, 26, 52, 64, 104, 129, 208, 256, 257, 416, 832, 1291, 1664, 2048, 2100):
        x = torch.randn(tokens, 768, generator=generator).bfloat16()
        expected = x.float() @ weight.T
        with torch.inference_mode():
            actual = linear(x.cuda()).float().cpu()
        assert float((actual - expected).norm() / expected.norm()) < 0.004
