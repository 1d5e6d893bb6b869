"""Which kernel serves a packed linear: the one that is there, right, and the faster one."""

import importlib.machinery
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from colqwen3.checkpoint.packing import pack
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


def test_error_is_relative_to_the_dequantized_weight() -> None:
    result = parts()
    right = dequantized(result, 4, 32, F32)
    assert kernel_error(right, result, 4, F32) < 1e-6
    assert kernel_error(lambda x: 0.5 * right(x), result, 4, F32) == pytest.approx(0.5, abs=1e-5)
    assert not kernel_error(lambda x: right(x) * torch.nan, result, 4, F32) < 1
