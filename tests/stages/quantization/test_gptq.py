"""GPTQ against the formulas it stands for: optimal brain surgeon, step by step in numpy."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from colqwen3.checkpoint.packing import dense_weight, restore_codes, round_to_nearest
from colqwen3.system.errors import NonFiniteWeightsError
from stages.quantization import gptq
from stages.quantization.activations import Sample, layer_outputs, output_error
from stages.quantization.gptq import (
    collect_hessians,
    effect_error,
    quantize_by_outputs,
    quantize_weight,
    run_gptq,
    search_scale,
)
from stages.quantization.model_hessians import Effect
from stages.quantization.recipes import GptqRecipe
from stages.quantization.tuning import round_layer, tune_layer

CPU = torch.device("cpu")
Array = NDArray[np.float64]


def recipe(bits: Any = 4) -> GptqRecipe:
    return GptqRecipe(
        method="gptq", calibration="any", bits=bits, group_size=32, sym=True
    )  # fmt: skip


def tokens(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Tokens in few directions, as true activations are, with a little of everything."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(6, width, generator=generator)
    mixed = torch.randn(count, 6, generator=generator) @ directions
    return mixed + 0.1 * torch.randn(count, width, generator=generator)


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.double().T @ inputs.double()


def surgeon(weight: Array, hessian: Array, bits: int, scales: Array) -> NDArray[np.int8]:
    """Return the codes of the optimal brain surgeon in a fixed order, with given scales.

    Each column is rounded, and the columns after it take what keeps the squared error of the
    outputs smallest: minus the error, divided by the first number of the inverse of the Hessian of
    the columns that are left, times that inverse's first row. The inverse is computed anew for each
    column, without Cholesky.
    """
    weight, count = weight.copy(), weight.shape[1]
    size, limit = count // scales.shape[1], 2 ** (bits - 1)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(count)
    codes = np.empty(weight.shape, np.int8)
    for place in range(count):
        inverse = np.linalg.inv(damped[place:, place:])
        scale = scales[:, place // size]
        code = np.clip(np.round(weight[:, place] / scale), -limit, limit - 1)
        codes[:, place] = code
        error = weight[:, place] - code * scale
        weight[:, place:] -= np.outer(error / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_codes_are_those_of_the_optimal_brain_surgeon(bits: int, group_size: int) -> None:
    weight, hessian = weights(8, 128), moments(tokens(300, 128))
    codes, scales = quantize_weight(weight, hessian, bits, group_size)
    expected = surgeon(
        weight.double().numpy(), hessian.numpy(), bits, scales.double().numpy()
    )  # fmt: skip
    assert np.array_equal(codes.numpy(), expected)
    rounded, _ = round_to_nearest(weight, bits, group_size)
    assert not torch.equal(codes, rounded)  # else nothing was shown


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_llm_compressor(bits: int) -> None:
    """Where it is installed: ``pip install --no-deps llmcompressor compressed-tensors loguru``."""
    library = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs
    weight, hessian = weights(64, 256), moments(tokens(500, 256))
    codes, scales = quantize_weight(weight, hessian, bits, 128)
    options = arguments(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=128)
    (expected,), _, _ = library.quantize_weight(
        weight.clone()[None], hessian.float()[None], scales.float()[None],
        torch.zeros_like(scales, dtype=torch.int8)[None], None, options,
    )  # fmt: skip
    dense = codes.float() * scales.float().repeat_interleave(128, dim=1)
    same = (dense - expected).abs() < 1e-6
    assert float(same.float().mean()) > 0.99  # it computes in float32: near ties may differ


def test_the_second_of_two_weights_makes_up_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In closed form: with the first one rounded, least squares gives the second."""
    monkeypatch.setattr(gptq, "DAMPING", 0.0)
    one, two = tokens(50, 2, 3).double().unbind(1)
    hessian = moments(torch.stack([one, two], dim=1))
    weight = torch.tensor([[0.83, -0.41], [0.2, 0.77], [-0.6, 0.35]])
    codes, scales = quantize_weight(weight, hessian, 4, 2)
    step = scales.double().squeeze(1)
    first = weight[:, 0].double() - codes[:, 0] * step
    second = weight[:, 1].double() + first * (one @ two) / (two @ two)
    assert torch.equal(codes[:, 1].double(), (second / step).round().clamp(-8, 7))


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest() -> None:
    weight = weights(16, 64)
    hessian = torch.diag(torch.rand(64, dtype=torch.float64) + 0.1)
    codes, scales = quantize_weight(weight, hessian, 4, 32)
    steps = weight.double().view(16, 2, 32) / scales.double().unsqueeze(-1)
    assert torch.equal(codes.double(), steps.round().clamp(-8, 7).flatten(1))


def test_without_shrinking_scales_and_diagonal_hessian_it_is_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gptq, "SHRINKAGE", torch.ones(1, dtype=torch.float64))
    weight = weights(16, 64)
    for found, expected in zip(
        quantize_weight(weight, torch.eye(64, dtype=torch.float64), 3, 32),
        round_to_nearest(weight, 3, 32),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_scale_is_the_best_of_all_that_are_tried(bits: int) -> None:
    weight = weights(4, 32).double()
    found = search_scale(weight, bits)
    _, largest = round_to_nearest(weight, bits, 32)
    limit = 2 ** (bits - 1)

    def error(row: int, scale: float) -> float:
        values = weight[row].numpy()
        rounded = np.clip(np.round(values / scale), -limit, limit - 1) * scale
        return float(((rounded - values) ** 2).sum())

    for row in range(4):
        tried = [float(np.float16(float(largest[row]) * (1 - 0.02 * i))) for i in range(21)]
        errors = {scale: error(row, scale) for scale in tried}
        assert float(found[row]) == min(errors, key=lambda scale: errors[scale])
    assert not torch.equal(found, largest.squeeze(1))


def test_error_of_outputs_is_near_the_smallest_possible() -> None:
    """Of six weights of 2 bits, all 4 ** 6 roundings are tried."""
    inputs, weight = tokens(40, 6, 5).double(), weights(5, 6, 6)
    hessian = moments(inputs)
    codes, scales = quantize_weight(weight, hessian, 2, 6)
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)), dtype=torch.float64)

    def errors(candidates: torch.Tensor, row: int) -> torch.Tensor:
        difference = candidates * scales[row].double() - weight[row].double()
        return ((difference @ hessian) * difference).sum(-1)

    rounded = (weight.double() / scales.double()).round().clamp(-2, 1)
    found, nearest, best = (
        sum(float(errors(rows[row], row).min()) for row in range(5))
        for rows in (codes.double().unsqueeze(1), rounded.unsqueeze(1), every.expand(5, -1, -1))
    )
    assert best <= found < nearest
    assert found - best < 0.5 * (nearest - best)


def test_inputs_that_are_always_0_do_no_harm() -> None:
    inputs = tokens(100, 64)
    inputs[:, 5] = inputs[:, 40] = 0
    weight = weights(8, 64).double()

    def error(codes: torch.Tensor, scales: torch.Tensor) -> float:
        dense = codes.double() * scales.double().repeat_interleave(32, dim=1)
        return float(((dense - weight) @ inputs.double().T).norm())

    codes, scales = quantize_weight(weight, moments(inputs), 4, 32)
    assert error(codes, scales) < 0.5 * error(*round_to_nearest(weight, 4, 32))
    steps = weight.view(8, 2, 32) / scales.double().unsqueeze(-1)
    nearest = steps.round().clamp(-8, 7).flatten(1)
    assert torch.equal(codes[:, [5, 40]].double(), nearest[:, [5, 40]])
    nothing, _ = quantize_weight(weights(8, 64), torch.zeros(64, 64, dtype=torch.float64), 4, 32)
    assert nothing.abs().max() > 0


BITS = {"first": 4, "second": 4}


class Layer(nn.Module):
    """Two linears, the second on what the first gives, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64, bias=False)

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.second(torch.relu(self.first(hidden_states + shift)))
        return hidden_states + inner


def given(count: int = 4) -> tuple[list[Sample], list[torch.Tensor]]:
    states = [tokens(30 + i, 64, 10 + i).unsqueeze(0) for i in range(count)]
    return [{"shift": 0.1 * state} for state in states], states


def test_hessians_are_of_all_tokens_of_all_samples() -> None:
    layer, (inputs, states) = Layer(), given()
    found = collect_hessians(layer, inputs, states, CPU)
    assert list(found) == ["first", "second"]
    seen = torch.cat([1.1 * state[0] for state in states])
    inner = torch.relu(layer.first(seen)).detach()
    for hessian, expected in zip(found.values(), (moments(seen), moments(inner)), strict=True):
        assert hessian.dtype == torch.float64
        torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-2)
    assert not layer.first._forward_pre_hooks  # nothing is left behind


def test_the_layers_outputs_are_those_before_and_after() -> None:
    layer, (inputs, states) = Layer(), given()
    original = copy.deepcopy(layer)
    shifted = [state + 0.01 for state in states]
    before, after, hessians = run_gptq(layer, inputs, states, shifted, recipe(), BITS, CPU)
    for found, expected in (
        (before, layer_outputs(original, inputs, states, CPU)),
        (after, layer_outputs(layer, inputs, shifted, CPU)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    expected_hessians = collect_hessians(original, inputs, shifted, CPU)  # not those of `states`
    assert hessians.keys() == expected_hessians.keys()
    assert all(torch.equal(hessians[name], expected_hessians[name]) for name in hessians)
    codes, scales = quantize_weight(original.first.weight, hessians["first"], 4, 32)
    first: Any = layer.first
    assert torch.equal(first.scale, scales)
    restored, gap = restore_codes(layer.first.weight.detach(), scales, 4)
    assert torch.equal(restored, codes) and gap < 1e-3
    assert layer.first.bias is not None and torch.equal(layer.first.bias, original.first.bias)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_beats_rounding_on_the_layers_outputs(bits: int) -> None:
    layer, (inputs, states) = Layer(), given()
    rounded = copy.deepcopy(layer)
    before, _, outcome = tune_layer(
        layer, inputs, states, None, recipe(bits), dict.fromkeys(BITS, bits), CPU
    )
    round_layer(rounded, dict.fromkeys(BITS, bits), 32)
    expected = output_error(layer_outputs(rounded, inputs, states, CPU), before)
    assert outcome.rounded == pytest.approx(expected)
    assert outcome.tuned < 0.8 * outcome.rounded


def test_a_layer_that_loses_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, (inputs, states) = Layer(), given()
    rounded = copy.deepcopy(layer)
    scales = round_layer(rounded, BITS, 32)
    real = quantize_weight
    monkeypatch.setattr(gptq, "quantize_weight", lambda w, h, b, g: real(-w, h, b, g))
    _, after, outcome = tune_layer(layer, inputs, states, None, recipe(), BITS, CPU)
    assert not outcome.tuning_won
    assert torch.equal(layer.first.weight, rounded.first.weight)
    second: Any = layer.second
    assert torch.equal(second.scale, scales["second"])
    assert after is not None
    for found, expected in zip(after, layer_outputs(rounded, inputs, states, CPU), strict=True):
        assert torch.equal(found, expected)


def test_inputs_that_are_not_finite_are_named() -> None:
    layer, (inputs, states) = Layer(), given()
    states[2][0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteWeightsError, match="first is given NaN or infinite inputs"):
        run_gptq(layer, inputs, states, None, recipe(), BITS, CPU)


class Cards:
    """Stands for torch.cuda with two cards: the first is current, the tensors are on the second."""

    def __init__(self) -> None:
        self.current, self.streams = "first", ["default of first"]

    @contextmanager
    def on(self, card: str, stream: str) -> Iterator[None]:
        before, self.current = self.current, card
        self.streams.append(stream)
        yield
        self.streams.pop()
        self.current = before

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stream:
            def __init__(self, *_: Any) -> None:
                self.name = "own of second"

            def wait_stream(self, _: Any) -> None: ...

        @contextmanager
        def graph(_: Any, stream: Any = None) -> Iterator[None]:
            assert self.current == "second"  # torch waits here for what the current card computes
            # torch keeps one stream for all graphs, on the card that was current at the first of them
            card, name = ("second", stream.name) if stream else ("first", "shared, of first")
            with self.on(card, name):
                yield

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.on("second", stream.name))
        monkeypatch.setattr(torch.cuda, "device", lambda _: self.on("second", "default of second"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", graph)


def test_a_function_is_recorded_on_the_card_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = Cards()
    cards.patch(monkeypatch)
    ran: list[tuple[str, str]] = []

    def function(tensor: torch.Tensor) -> tuple[torch.Tensor]:
        ran.append((cards.current, cards.streams[-1]))
        return (tensor,)

    gptq.Recorded(function, torch.ones(1))
    assert ran == 2 * [("second", "own of second")]  # set up, and recorded
    assert (cards.current, cards.streams) == ("first", ["default of first"])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_weight_is_rounded_on_a_card_that_is_not_the_current_one() -> None:
    weight, hessian = weights(96, 128), moments(tokens(300, 128))
    for card in ("cuda:0", "cuda:1"):
        actual = quantize_weight(weight.to(card), hessian.to(card), 4, 32)
        for ours, expected in zip(actual, quantize_weight(weight, hessian, 4, 32), strict=True):
            assert torch.equal(ours.cpu(), expected)
    assert torch.cuda.current_device() == 0


@needs_gpu
def test_a_recorded_group_is_rounded_as_an_unrecorded_one() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    limit = torch.tensor([2, 8, 128] * 32, device="cuda")

    def draw() -> tuple[torch.Tensor, ...]:
        block, factors = (
            torch.randn(rows, 32, generator=generator, device="cuda", dtype=torch.float64)
            for rows in (96, 32)
        )
        factors = factors.triu() + 8 * torch.eye(32, device="cuda", dtype=torch.float64)
        return block, factors, block.abs().amax(1) / limit, limit

    recorded = gptq.Recorded(gptq.round_group, *draw())
    for _ in range(3):  # replayed on other numbers
        drawn = draw()
        actual = recorded(*drawn)
        for ours, expected in zip(actual, gptq.round_group(*drawn), strict=True):
            assert torch.equal(ours, expected)


@needs_gpu
@pytest.mark.parametrize("shape", [(200, 96), (96, 200), (256, 320), (40, 24)])
def test_blocks_are_rounded_on_a_gpu_as_on_a_cpu(shape: tuple[int, int]) -> None:
    weight, inner, outer = problem(shape)
    codes, scales = quantize_by_outputs(weight, inner, outer, 4, shape[1] // 2)
    for found, expected in zip(
        quantize_by_outputs(weight.cuda(), inner.cuda(), outer.cuda(), 4, shape[1] // 2),
        (codes, scales),
        strict=True,
    ):
        assert torch.equal(found.cpu(), expected)


def kronecker_surgeon(weight: Array, inner: Array, outer: Array, scales: Array) -> NDArray[np.int8]:
    """Return 4-bit codes where errors count by both factors: row after row, each by the surgeon.

    After a row is rounded, the rows after it take what keeps tr(outer E inner E^T) smallest, found
    anew from the inverse of the block of the rows that are left.
    """
    count = len(weight)
    target, errors = weight.copy(), np.zeros_like(weight)
    damped = outer + 0.01 * np.mean(np.diag(outer)) * np.eye(count)
    codes = np.empty(weight.shape, np.int8)
    for row in range(count):
        codes[row] = surgeon(target[row : row + 1], inner, 4, scales[row : row + 1])[0]
        wide = np.repeat(scales[row], weight.shape[1] // scales.shape[1])
        errors[row] = weight[row] - codes[row] * wide
        left = damped[row + 1 :, row + 1 :]
        target[row + 1 :] = weight[row + 1 :] + np.linalg.solve(
            left, damped[row + 1 :, : row + 1] @ errors[: row + 1]
        )
    return codes


def kronecker_loss(
    weight: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor, made: tuple[torch.Tensor, ...]
) -> float:
    error = weight.double() - dense_weight(*made).double()
    return float(torch.trace(outer @ error @ inner @ error.T))


@pytest.mark.parametrize("shape", [(12, 64), (80, 32), (1, 64)])
def test_rows_make_up_for_the_errors_of_rows_before(shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight, inner = weights(*shape), moments(tokens(300, columns))
    outer = moments(tokens(100, rows, 3))
    codes, scales = quantize_by_outputs(weight, inner, outer, 4, 32)
    expected = kronecker_surgeon(
        weight.double().numpy(), inner.numpy(), outer.numpy(), scales.double().numpy()
    )
    assert np.array_equal(codes.numpy(), expected)
    if rows > 1:
        alone = kronecker_loss(weight, inner, outer, quantize_weight(weight, inner, 4, 32))
        assert kronecker_loss(weight, inner, outer, (codes, scales)) < 0.7 * alone


def problem(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight of a shape, and what its inputs and its outputs do."""
    rows, columns = shape
    return weights(*shape), moments(tokens(400, columns)), moments(tokens(400, rows, 3))


def walk_diagonals(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    outer: torch.Tensor,
    bits: int,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Return the codes of `quantize_by_outputs`, by each diagonal of the whole weight in turn."""
    weight = weight.double()
    (rows, columns), limit = weight.shape, 2 ** (bits - 1)
    steps = scales.double().repeat_interleave(columns // scales.shape[1], dim=1)
    inner, across = gptq.inverse_factor(hessian), gptq.inverse_factor(outer)
    codes, owed = torch.empty(weight.shape, dtype=torch.int8), torch.zeros_like(weight)
    numbers = torch.arange(rows)
    for diagonal in range(rows + columns - 1):
        row = numbers[max(0, diagonal - columns + 1) : diagonal + 1]
        column = diagonal - row
        target, step = weight[row, column], steps[row, column]
        wanted = target - owed[row, column]
        code = (wanted / step).round().clamp(-limit, limit - 1)
        codes[row, column] = code.to(torch.int8)
        error = (wanted - code * step) / inner.diagonal()[column]
        owed[row] += error.unsqueeze(1) * inner[column]
        error = (target - code * step) / across.diagonal()[row]
        weight[:, column] -= across[row].T * error
    return codes


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize(
    "shape", [(64, 64), (65, 64), (70, 260), (260, 70), (256, 320), (330, 192), (1, 140), (140, 2)]
)
def test_blocks_are_rounded_as_weight_after_weight(shape: tuple[int, int], bits: int) -> None:
    weight, inner, outer = problem(shape)
    kept = weight.clone()
    codes, scales = quantize_by_outputs(weight, inner, outer, bits, shape[1] // 2)
    assert codes.dtype == torch.int8 and torch.equal(weight, kept)
    assert torch.equal(codes, walk_diagonals(weight, inner, outer, bits, scales))


@pytest.mark.parametrize("inside", [False, True])
def test_blocks_and_weights_in_them_need_their_order(
    monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """Else the test above says little."""
    weight, inner, outer = problem((200, 260))
    real = gptq.diagonals

    def backwards(height: int, width: int) -> Iterator[tuple[int, slice, slice]]:
        found = real(height, width)
        return reversed(list(found)) if inside == (height == gptq.SIDE) else found

    monkeypatch.setattr(gptq, "diagonals", backwards)
    codes, scales = quantize_by_outputs(weight, inner, outer, 4, 130)
    assert not torch.equal(codes, walk_diagonals(weight, inner, outer, 4, scales))


def test_rows_are_on_their_own_where_outputs_are() -> None:
    weight, inner = weights(12, 64), moments(tokens(300, 64))
    codes, scales = quantize_by_outputs(weight, inner, torch.eye(12, dtype=torch.float64), 3, 32)
    expected = surgeon(weight.double().numpy(), inner.numpy(), 3, scales.double().numpy())
    assert np.array_equal(codes.numpy(), expected)
    for group in range(2):
        block = weight.double()[:, 32 * group : 32 * (group + 1)]
        assert torch.equal(scales[:, group], search_scale(block, 3))


def test_outputs_without_effect_are_no_error() -> None:
    weight, inner = weights(8, 64), moments(tokens(300, 64))
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    codes, scales = quantize_by_outputs(weight, inner, nothing, 4, 32)
    assert scales.isfinite().all() and len(set(codes.flatten().tolist())) > 8


def effects_of(states: list[torch.Tensor]) -> dict[str, Effect]:
    """Return some effect of each linear, as if errors of some tokens and outputs mattered most."""
    found = {}
    for seed, (name, outputs) in enumerate({"first": 96, "second": 64}.items()):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.rand(state.shape[1], generator=generator) for state in states]
        found[name] = Effect(drawn, moments(tokens(200, outputs, seed)).float())
    return found


def test_gptq_by_the_whole_model_weights_tokens_and_outputs() -> None:
    layer, (inputs, states) = Layer(), given()
    original, effects = copy.deepcopy(layer), effects_of(states)
    run_gptq(layer, inputs, states, None, recipe(), BITS, CPU, effects)
    caught: list[torch.Tensor] = []
    handle = original.first.register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
    list(layer_outputs(original, inputs, states, CPU))
    handle.remove()
    weighted = torch.cat(caught) * torch.cat(list(effects["first"].weights)).sqrt().unsqueeze(1)
    codes, scales = quantize_by_outputs(
        original.first.weight, moments(weighted), effects["first"].outer.double(), 4, 32
    )
    first: Any = layer.first
    assert torch.equal(first.scale, scales)
    assert torch.allclose(layer.first.weight, dense_weight(codes, scales))


def test_a_layer_is_kept_for_its_effect_even_where_its_output_is_worse() -> None:
    """Few directions of its outputs matter: GPTQ by the whole model moves errors into the others."""
    layer, (inputs, states) = Layer(), given()
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(state.shape, generator=generator) for state in states]  # all directions
    effects = {}
    for name, outputs in {"first": 96, "second": 64}.items():
        seen = torch.randn(24, outputs, generator=generator)
        effects[name] = Effect(
            [torch.ones(state.shape[1]) for state in states], (seen.T @ seen).float()
        )
    original, rounded = copy.deepcopy(layer), copy.deepcopy(layer)
    before, after, outcome = tune_layer(layer, inputs, states, None, recipe(), BITS, CPU, effects)
    round_layer(rounded, BITS, 32)
    assert after is not None
    worse, better = (
        output_error(layer_outputs(way, inputs, states, CPU), before) for way in (layer, rounded)
    )
    assert worse > better  # or this test says nothing
    assert outcome.tuned < 0.5 * outcome.rounded and outcome.tuning_won
    run_gptq(original, inputs, states, None, recipe(), BITS, CPU, effects)
    for one, other in ((layer.first, original.first), (layer.second, original.second)):
        assert torch.equal(one.weight, other.weight)


def test_judging_a_layer_by_its_effect_runs_it_no_further_time() -> None:
    layer, (inputs, states) = Layer(), given()
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(0))  # copies of the layer have it too
    tune_layer(layer, inputs, states, None, recipe(), BITS, CPU, effects_of(states))
    assert len(calls) == 3 * len(states)  # for outputs before and after, and for the Hessians


def test_gradients_that_are_not_finite_are_an_error() -> None:
    layer, (inputs, states) = Layer(), given()
    effects = effects_of(states)
    effects["first"].outer[0, 0] = effects["first"].weights[0][0] = float("nan")
    with pytest.raises(NonFiniteWeightsError, match="first has NaN or infinite gradients"):
        run_gptq(layer, inputs, states, None, recipe(), BITS, CPU, effects)


def test_the_error_of_effects_by_hand() -> None:
    """Of one linear [2, 2]: an error e of one output costs outer[0, 0] x hessian[1, 1] x e^2."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer = nn.ModuleDict({"one": nn.Linear(2, 2, bias=False)})
    layer["one"].weight.data = weight + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    outer, hessian = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([1.0, 9.0]))
    effects = {"one": Effect([], outer)}
    error = effect_error(layer, {"one": weight}, {"one": hessian.double()}, effects)
    whole = 4 * (1 + 9 * 4) + 1 * (9 + 9 * 16)
    assert error == pytest.approx((4 * 9 * 0.25 / whole) ** 0.5)
