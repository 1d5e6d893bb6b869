"""End-to-end tuning on a network small enough to follow by hand."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from colqwen3.checkpoint.packing import round_to_nearest
from colqwen3.system.errors import NonFiniteWeightsError, UserError
from stages.quantization import end_to_end
from stages.quantization.end_to_end import (
    EndToEndOutcome,
    Network,
    Tail,
    balance,
    draw_steps,
    hold_back,
    sum_losses,
    tune_end_to_end,
    updated_in_backward,
)
from stages.quantization.recipes import EndToEnd
from stages.quantization.tuned_linear import TunedLinear

CPU = torch.device("cpu")
KINDS = ["query"] * 9 + ["page"] * 9
RECIPE = EndToEnd(steps=100, codes_lr=0.003, scales_lr=0.005)
WIDTH = 32


class Layer(nn.Module):
    """A residual block, as a decoder layer is called; attention is none of this test's business."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        assert int(lengths.sum()) == hidden_states.shape[1]
        return hidden_states + torch.tanh(self.linear(hidden_states))


def linears(network: Network) -> list[TunedLinear]:
    return [
        part
        for layer in network.layers
        for part in layer.modules()
        if isinstance(part, TunedLinear)
    ]


def problem(bits: int = 3, with_codes: bool = True) -> tuple[Network, list[Any], list[Any]]:
    """Two layers rounded to nearest, with the inputs and targets of the original ones."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, generator=generator) / 6 for _ in range(2)]
    projection = nn.Linear(WIDTH, 16)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    tail = Tail(nn.Identity(), projection).requires_grad_(False)
    layers, originals = [], []
    for weight in weights:
        codes, scales = round_to_nearest(weight, bits, WIDTH)
        if not with_codes:
            scales = scales * 1.3  # something to find
        tuned = TunedLinear(codes, scales, bits, weight if with_codes else None)
        layers.append(Layer(tuned))
        original = nn.Linear(WIDTH, WIDTH, bias=False)
        original.weight = nn.Parameter(weight)
        originals.append(Layer(original))
    inputs = [
        {"hidden_states": torch.randn(1, 3 + number % 4, WIDTH, generator=generator)}
        for number in range(len(KINDS))
    ]
    network, full = Network(layers, tail, CPU), Network(originals, tail, CPU)
    with torch.no_grad():
        targets = [full.embed([sample]) for sample in inputs]
    return network, inputs, targets


def loss_by_hand(network: Network, inputs: Any, targets: Any, numbers: Any) -> float:
    with torch.no_grad():
        cosines = [
            torch.cosine_similarity(network.embed([inputs[n]]), targets[n], dim=-1).flatten()
            for n in numbers
        ]
    return 1 - float(torch.cat(cosines).double().mean())


@pytest.mark.parametrize("with_codes", [True, False])
def test_both_kinds_gain_on_samples_that_were_held_back(with_codes: bool) -> None:
    network, inputs, targets = problem(with_codes=with_codes)
    held = {"query": [0, 8], "page": [9, 17]}
    start = {kind: loss_by_hand(network, inputs, targets, held[kind]) for kind in held}
    outcome = tune_end_to_end(network, inputs, targets, KINDS, RECIPE)
    assert outcome.won
    for kind, numbers in held.items():
        end = loss_by_hand(network, inputs, targets, numbers)
        assert outcome.held_before[kind] == pytest.approx(start[kind], rel=1e-3)
        assert outcome.held_after[kind] == pytest.approx(end, rel=1e-3)
        assert end < 0.9 * start[kind]
        assert outcome.after[kind] < 0.9 * outcome.before[kind]


def test_the_same_seed_gives_the_same_codes_and_another_others() -> None:
    packed = []
    for seed in (1, 1, 2):
        network, inputs, targets = problem()
        tune_end_to_end(network, inputs, targets, KINDS, RECIPE.model_copy(update={"seed": seed}))
        packed.append([t for linear in linears(network) for t in linear.packed().values()])
    first, again, other = packed
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_samples_held_back_tell_and_are_not_tuned_on() -> None:
    packed, outcomes = [], []
    for turned in (False, True):
        network, inputs, targets = problem()
        if turned:
            for number in hold_back(KINDS):
                targets[number] = -targets[number]
        few = RECIPE.model_copy(update={"steps": 20})
        outcomes.append(tune_end_to_end(network, inputs, targets, KINDS, few))
        packed.append([t for linear in linears(network) for t in linear.packed().values()])
    first, other = outcomes
    assert all(torch.equal(a, b) for a, b in zip(*packed, strict=True))
    assert (first.before, first.after) == (other.before, other.after)
    assert min(other.held_after.values()) > 1 > max(first.held_after.values())


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (4, 0.5 * 0.96), (9, 0.91), (50, 0.5), (99, 0.01)]
)
def test_codes_and_scales_have_step_sizes_of_their_own_that_rise_and_fall(
    step: int, factor: float
) -> None:
    network, inputs, targets = problem()
    recipe = EndToEnd(steps=100, codes_lr=0.01, scales_lr=0.002)
    before = [linear.offset.detach().clone() for linear in linears(network)]
    with updated_in_backward(network, recipe) as set_step:
        set_step(step)
        loss, _ = sum_losses(network.embed(inputs[:1]), targets[:1], ["page"])["page"]
        (1e6 * loss).backward()  # type: ignore[no-untyped-call]
    # Adam's first step is the step size, whatever the gradient
    for linear, start in zip(linears(network), before, strict=True):
        for moved, size in (
            (linear.offset.detach() - start, 0.01),
            (linear.change.detach(), 0.002),
        ):
            assert float(moved.abs().max()) == pytest.approx(size * factor, rel=1e-3)
            assert float(moved.abs().median()) == pytest.approx(size * factor, rel=1e-2)


@pytest.mark.parametrize("still", ["codes_lr", "scales_lr"])
def test_a_step_size_of_zero_leaves_codes_or_scales_alone(still: str) -> None:
    network, inputs, targets = problem()
    start = [linear.packed() for linear in linears(network)]
    recipe = RECIPE.model_copy(update={"steps": 30, "codes_lr": 0.01, still: 0.0})
    tune_end_to_end(network, inputs, targets, KINDS, recipe)
    for linear, packed in zip(linears(network), start, strict=True):
        same = {name: torch.equal(packed[name], now) for name, now in linear.packed().items()}
        assert same == {
            "qweight": still == "codes_lr", "qzeros": True, "scales": still == "scales_lr",
        }  # fmt: skip


def test_every_sample_of_a_step_is_compared_with_its_own_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, inputs, _ = problem()
    with torch.no_grad():
        targets = [network.embed([sample]) for sample in inputs]
    numbers, real = {id(target): number for number, target in enumerate(targets)}, sum_losses
    steps = []

    def checked(embeddings: torch.Tensor, expected: Any, kinds: Any) -> Any:
        drawn = [numbers[id(target)] for target in expected]
        assert list(kinds) == [KINDS[number] for number in drawn]
        sums = real(embeddings, expected, kinds)
        assert max(float(total.detach()) for total, _ in sums.values()) < 1e-9
        steps.append(len(drawn))
        return sums

    monkeypatch.setattr(end_to_end, "sum_losses", checked)
    still = RECIPE.model_copy(update={"steps": 4, "codes_lr": 0.0, "scales_lr": 0.0})
    tune_end_to_end(network, inputs, targets, KINDS, still)
    assert [size for size in steps if size > 1] == [11] * 4  # 7 queries that are not held back


def test_neither_more_tokens_nor_a_larger_loss_give_a_kind_more_weight() -> None:
    sums = {"page": (torch.tensor(6.0), 300), "query": (torch.tensor(0.9), 3)}
    assert float(balance(sums, {"page": 0.04, "query": 0.6})) == pytest.approx(0.5)
    assert float(balance(sums, {"page": 0.02, "query": 0.1})) == pytest.approx(2.0)
    assert balance(sums, {"page": 0.0, "query": 0.1}).isfinite()


def test_gradients_are_gone_and_nothing_but_codes_and_scales_moves() -> None:
    network, inputs, targets = problem()
    before = {n: p.clone() for n, p in network.tail.named_parameters()}
    tune_end_to_end(network, inputs, targets, KINDS, RECIPE.model_copy(update={"steps": 2}))
    assert all(p.grad is None for layer in network.layers for p in layer.parameters())
    assert all(torch.equal(p, before[n]) for n, p in network.tail.named_parameters())
    for linear in linears(network):  # the hooks are gone too
        linear(torch.ones(1, WIDTH)).sum().backward()
        assert linear.change.grad is not None


def test_step_sizes_of_zero_change_nothing() -> None:
    network, inputs, targets = problem()
    start = [linear.packed() for linear in linears(network)]
    still = RECIPE.model_copy(update={"steps": 3, "codes_lr": 0.0, "scales_lr": 0.0})
    outcome = tune_end_to_end(network, inputs, targets, KINDS, still)
    assert outcome.before == outcome.after and outcome.won
    for linear, packed in zip(linears(network), start, strict=True):
        assert all(torch.equal(linear.packed()[name], packed[name]) for name in packed)


def test_numbers_that_are_no_numbers_are_an_error() -> None:
    network, inputs, targets = problem()
    targets[1] = targets[1] * float("nan")
    with pytest.raises(NonFiniteWeightsError, match="before end-to-end tuning; set end_to_end"):
        tune_end_to_end(network, inputs, targets, KINDS, RECIPE)
    for steps, told in ((100, r"at step [23] of 100; .*end_to_end"), (1, "ended in NaN or Inf; ")):
        network, inputs, targets = problem()
        wild = RECIPE.model_copy(update={"steps": steps, "scales_lr": 1e36, "codes_lr": 1e36})
        with pytest.raises(NonFiniteWeightsError, match=told):
            tune_end_to_end(network, inputs, targets, KINDS, wild)


def test_losses_are_one_minus_cosine_by_kind() -> None:
    embeddings = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]]])
    targets = [torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]]),
               torch.tensor([[[0.0, -1.0]]])]  # fmt: skip
    sums = sum_losses(embeddings, targets, ["page", "query", "page"])
    assert {kind: (round(float(total), 6), count) for kind, (total, count) in sums.items()} == {
        "page": (2.0, 3),  # 0, 1 and 1
        "query": (0.4, 1),
    }


@pytest.mark.parametrize(
    ("after", "won"),
    [
        ({"page": 1.0, "query": 2.0}, True),
        ({"page": 0.5, "query": 2.0}, True),
        ({"page": 0.1, "query": 2.1}, False),
        ({"page": 1.1, "query": 0.1}, False),
    ],
)
def test_it_won_if_no_kind_that_was_held_back_lost(after: dict[str, float], won: bool) -> None:
    assert EndToEndOutcome({}, {}, {"page": 1.0, "query": 2.0}, after).won is won


def test_an_eighth_of_each_kind_is_held_back() -> None:
    kinds = ["query"] * 17 + ["page"] * 2
    assert hold_back(kinds) == {0, 8, 16, 17}


def test_one_sample_of_a_kind_is_too_few() -> None:
    with pytest.raises(UserError, match="the set has one page: draw more, or none"):
        hold_back(["query", "query", "page"])


def test_steps_go_through_all_samples_of_a_kind_before_any_again() -> None:
    kinds = ["query"] * 16 + ["page"] * 3 + ["passage"] * 4
    numbers = [n for n in range(len(kinds)) if n != 5]
    steps = list(itertools.islice(draw_steps(kinds, numbers, 7), 12))
    for step in steps:  # 8 queries, as many pages as there are, 2 passages
        assert [sum(kinds[n] == kind for n in step) for kind in ("query", "page", "passage")] == [
            8, 3, 2,
        ]  # fmt: skip
    queries = [n for step in steps for n in step if kinds[n] == "query"]
    for start in range(0, 90, 15):
        assert sorted(queries[start : start + 15]) == [n for n in range(16) if n != 5]
    assert steps == list(itertools.islice(draw_steps(kinds, numbers, 7), 12))
    assert steps != list(itertools.islice(draw_steps(kinds, numbers, 8), 12))
