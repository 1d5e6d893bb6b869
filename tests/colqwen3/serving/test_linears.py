"""Which kernel serves a packed linear: the one that is there, right, and the faster one."""

import importlib
import importlib.machinery
import json
import logging
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colqwen3.checkpoint.packing import pack, pack_table
from colqwen3.serving import fused, linears
from colqwen3.serving.humming_tiles import Product
from colqwen3.serving.linears import (
    OWN_TILES,
    Linear,
    Parts,
    choose_kernel,
    dequantized,
    kernel_errors,
    local_error,
)

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
    monkeypatch.setitem(linears.KERNELS, "dense", lambda *args: slow(dequantized(*args), 0.02))
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


def test_a_kernel_that_is_off_everywhere_by_little_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(result: Parts, *how: Any) -> Linear:
        return dequantized({**result, "scales": result["scales"] * 1.05}, *how)

    installed(monkeypatch, wrong)
    with caplog.at_level(logging.INFO):
        assert choose_kernel(parts(), 4, 32, F32) == "dense"
    assert f"{NAME} is off by 0.05, and by 0.05 for a token or an output" in caplog.text


def test_a_kernel_that_fails_while_it_is_timed_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("no thread left")

    installed(monkeypatch, dequantized)
    monkeypatch.setattr(linears, "_cpu_seconds", fail)
    with caplog.at_level(logging.INFO):
        assert choose_kernel(parts(), 4, 32, F32) == "dense"
    assert f"{NAME} fails (no thread left)" in caplog.text


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
    assert max(kernel_errors(right, result, 4, F32)) < 1e-6
    halved = kernel_errors(lambda x: 0.5 * right(x), result, 4, F32)
    assert halved == pytest.approx((0.5, 0.5), abs=1e-5)
    whole, local = kernel_errors(lambda x: right(x) * torch.nan, result, 4, F32)
    assert not whole < 1
    assert not local < 1


def test_local_error_is_that_of_the_worst_row_or_column() -> None:
    expected = torch.ones(200, 100)
    expected[:, 7] = 0  # counts as a tenth of the whole
    # one number of a row of 100 counts by the root of its share
    for place, worst in (((3, slice(None)), 0.5), ((slice(None), 3), 0.5), ((0, 0), 0.05)):
        error = torch.zeros_like(expected)
        error[place] = 0.5
        assert float(local_error(error, expected)) == pytest.approx(worst, rel=0.01)
    error = torch.zeros_like(expected)
    error[:, 7] = 0.03
    assert float(local_error(error, expected)) == pytest.approx(0.3, rel=0.01)


def test_one_wrong_output_is_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(result: Parts, *how: Any) -> Linear:
        right = dequantized(result, *how)
        return lambda x: right(x) * (torch.arange(2048) != 5)

    monkeypatch.setattr(linears, "find_spec", lambda _: "installed")
    monkeypatch.setitem(linears.KERNELS, NAME, wrong)
    packed = parts(64, 2048)
    assert kernel_errors(wrong(packed, 4, 32, F32), packed, 4, F32)[0] < 0.023
    with caplog.at_level(logging.INFO):
        assert choose_kernel(packed, 4, 32, F32) == "dense"
    assert "and by 1 for a token or an output: 4-bit weights [2048, 64]" in caplog.text


@pytest.mark.parametrize(
    ("failing", "expected"),
    [((), "humming"), (("humming",), OWN_TILES), (("humming", OWN_TILES), "dense")],
)
def test_where_tiles_fail_hummings_own_are_used(
    failing: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def make(name: str) -> Linear:
        if name in failing:
            raise OSError("no compiler")
        return lambda x: x

    for name in ("humming", OWN_TILES):
        monkeypatch.setitem(linears.KERNELS, name, lambda *_, name=name, **more: make(name))
    monkeypatch.setattr(linears, "find_spec", lambda _: "installed")
    monkeypatch.setattr(linears, "kernel_errors", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(linears, "humming_product", lambda *_: Product(64, 32, 132))
    on_gpu = {"qweight": SimpleNamespace(device=torch.device("cuda"), shape=(8, 32))}
    assert choose_kernel(on_gpu, 4, 32, torch.bfloat16) == expected  # type: ignore[arg-type]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len(failing)
    if failing:
        assert warnings[0].startswith(
            "humming fails (no compiler): 4-bit weights [32, 64] are tried"
        )
    if len(failing) == 2:
        assert warnings[1].startswith(
            f"{OWN_TILES} fails (no compiler): 4-bit weights [32, 64] are"
        )
        assert "served dense" in warnings[1]


def test_a_gate_within_a_product_is_compared_with_one_after_it() -> None:
    packed = parts(64, 32)
    plain = dequantized(packed, 4, 32, F32)

    def errors(gated: Linear) -> tuple[float, float]:
        return kernel_errors(lambda x: linears.Gated(gated(x)), packed, 4, F32)

    assert max(errors(lambda x: fused.gate(plain(x)))) < 1e-5
    for wrong in (
        lambda x: fused.gate(1.2 * plain(x)),
        lambda x: fused.gate(plain(x).roll(1, 1)),
        lambda x: fused.gate(plain(x)) * (torch.arange(16) != 5),
    ):
        assert max(errors(wrong)) > linears.MAXIMUM_LOCAL_ERROR


def test_only_hummings_kernel_is_told_of_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    sums = linears.GateSums()

    def make(name: str, more: dict[str, Any]) -> Linear:
        told[name] = more
        return lambda x: x

    for name in linears.KERNELS:
        builder = lambda *_, name=name, **more: make(name, more)  # noqa: E731
        monkeypatch.setitem(linears.KERNELS, name, builder)
        linears.build(name, parts(), 4, 32, F32, gate=sums)
    assert told == {name: {} for name in linears.KERNELS} | {"humming": {"gate": sums}}


@pytest.fixture
def fake_humming(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for humming's modules; returns what kernels were prepared of."""
    prepared: list[Any] = []

    class HummingKernel:
        code = ""

        @classmethod
        def prepare_kernels(cls, config: str, _: None, tuning: str, device: Any) -> str:
            prepared.append((cls.__name__, json.loads(config), json.loads(tuning)))
            return cls.__name__

        def prepare(self) -> None:
            prepared.append(self.code)

    def launch(*, configs: str, inputs: torch.Tensor, **more: Any) -> tuple[str, int, Any]:
        return configs, len(inputs), {key: more[key] for key in more if key in GATED_TAKES}

    tile = {"block_shape": [16, 128, 64]}
    modules: dict[str, dict[str, Any]] = {
        "humming": {},
        "humming.kernel": {},
        "humming.kernel.humming": {"HummingKernel": HummingKernel},
        "humming.ops": {"launch_kernel": launch},
        "humming.tune": {
            "get_heuristics_config": lambda *_, **__: [(0, 64, tile), (64, 1 << 30, tile)]
        },
    }
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    monkeypatch.setitem(sys.modules, GATE, None)
    del sys.modules[GATE]
    return prepared


GATE = "colqwen3.serving.humming_gate"
GATED_TAKES = "sorted_ids", "top_k"


@pytest.mark.parametrize("gate", [False, True])
def test_a_gate_is_within_the_product_of_many_tokens(gate: bool, fake_humming: list[Any]) -> None:
    config = SimpleNamespace(to_str=lambda: json.dumps({"shape_n": 19456, "shape_k": 2560}))
    scale = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    weight = torch.nn.Parameter(torch.zeros(1))
    layer = SimpleNamespace(humming_config=config, locks=None, weight=weight, weight_scale=scale)
    product, sums = Product(2560, 19456, 132), linears.GateSums() if gate else None
    linear = linears._without_overhead(layer, product, sums)
    assert not fake_humming  # nothing is compiled before it is called
    assert linear(torch.zeros(192, 1)) == ("HummingKernel", 192, {})
    many = linear(torch.zeros(193, 1))
    if sums:
        assert isinstance(many, linears.Gated)
        name, tokens, more = many.values
        assert (name, tokens, more["top_k"]) == ("GatedKernel", 193, 40)
        assert more["sorted_ids"].shape == (40 * 128 * 128,)
        assert more["sorted_ids"].dtype == torch.bfloat16
        (_, plain, few), (_, gated, ranges) = fake_humming
        assert gated == {**plain, "pad_shape_n": 9728}  # half as many outputs
        assert few[-1][1] == 192
        again = linears._without_overhead(layer, product, sums)(torch.zeros(193, 1))
        assert again.values[2]["sorted_ids"] is more["sorted_ids"]  # of all layers
        del fake_humming[2:]
    else:
        assert many == ("HummingKernel", 193, {})
        ((_, _, ranges),) = fake_humming
    assert (ranges[0][0], ranges[-1][1]) == (0, 1 << 30)
    assert all(options["use_pdl"] for _, _, options in ranges)
    linear(torch.zeros(1, 1))
    assert len(fake_humming) == 1 + gate


def test_a_gated_kernel_is_hummings_with_another_end(fake_humming: list[Any]) -> None:
    gate = importlib.import_module(GATE)
    kernel = gate.GatedKernel()
    kernel.code = f"constant {gate.COLUMNS};\n"
    kernel.prepare()
    (code,) = fake_humming
    assert code.startswith(f"constant {gate.COLUMNS} / 2;\n")
    assert "class EpiloguePipeline<KernelContext<Options...>" in code
    kernel.code = "another version"
    with pytest.raises(RuntimeError, match="another source"):
        kernel.prepare()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="humming needs a GPU")
@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size", "deterministic", "gate"),
    [(2560, 19456, 128, False, True), (9728, 2560, 64, True, False), (512, 768, 32, True, True)],
)
def test_humming_is_right_with_each_of_its_tiles(
    inputs: int,
    outputs: int,
    group_size: int,
    deterministic: bool,
    gate: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("humming")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, generator=generator)
    scales = torch.rand(outputs, inputs // group_size, generator=generator).half() + 0.1
    packed = {name: part.cuda() for name, part in pack(codes, scales, 4).items()}
    sums = linears.GateSums() if gate else None
    linear = linears.humming(packed, 4, group_size, torch.bfloat16, gate=sums)
    whole, local = kernel_errors(linear, packed, 4, torch.bfloat16, sums)
    assert whole < 0.01
    assert local < 0.05
    if deterministic:
        for tokens in (1, 26, 208, 512, 1291, 5164):
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            expected = linear(x)
            assert all(torch.equal(linear(x), expected) for _ in range(20))
