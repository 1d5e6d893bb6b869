"""Tuning of all codes and group scales together, on the embeddings that the whole model gives.

Layers that were quantized one at a time were each fitted to their own output. Here all of them are
tuned at once, so that the final embeddings come close to those of the full-precision model. The
scales alone are the second phase of Chen et al., "EfficientQAT: Efficient Quantization-Aware Training
for Large Language Models", arXiv:2407.11062; the codes follow real numbers that are rounded in the
forward pass, with straight-through gradients (Bengio et al., arXiv:1308.3432). The loss is what
matters to a retriever, 1 - cosine of tokens.

All decoder layers are in memory at once: a code takes one byte, and 12 more where codes are tuned.
Activations are kept at layer boundaries only and computed again in the backward pass (Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174), and a tensor is updated as soon as
its gradient is known, which is then dropped. What comes before the layers is not needed: their inputs
were captured.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from colqwen3.system.errors import NonFiniteWeightsError, UserError
from colqwen3.system.progress import Progress
from stages.quantization.activations import Hidden, Sample, unflatten
from stages.quantization.recipes import EndToEnd
from stages.quantization.sample_packs import pack_samples
from stages.quantization.tuned_linear import TunedLinear

DRAWN = {"page": 4, "query": 8, "passage": 2}
"""Samples of each kind in a step."""
HELD_BACK = 8
"""One sample of so many of a kind is not tuned on: it tells whether tuning helped."""
WARM_UP = 10
"""Steps until the step size is reached, a tenth of all at most."""
Losses = dict[str, float]
"""Kind of sample -> 1 - mean cosine of its tokens to the full-precision model's."""


class Tail(nn.Module):
    """What follows the last decoder layer: hidden states [1, tokens, hidden] to unit vectors."""

    def __init__(self, norm: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.norm, self.projection = norm, projection

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [1, tokens, embed_dim]."""
        return nn.functional.normalize(self.projection(self.norm(hidden)), dim=-1)


@dataclass(frozen=True)
class EndToEndOutcome:
    """What the tuning did, by kind of sample.

    Attributes
    ----------
    before, after
        Losses on the samples that it was tuned on.
    held_before, held_after
        On those held back.
    """

    before: Losses
    after: Losses
    held_before: Losses
    held_after: Losses

    @property
    def won(self) -> bool:
        """Whether the tuned scales are kept: no kind of the samples held back is worse."""
        return all(loss <= self.held_before[kind] for kind, loss in self.held_after.items())


@contextmanager
def accurate_arithmetic(device: torch.device) -> Iterator[None]:
    """Have a GPU multiply float32 matrices with 10 bits of mantissa, repeatably; a CPU does as always.

    In bfloat16 the noise of the arithmetic would be as large as the loss to tune. The gradient of
    torch's memory-efficient attention, which takes float32, differs from run to run.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def hold_back(kinds: Sequence[str]) -> set[int]:
    """Return the numbers of the samples that are not tuned on: the first of every `HELD_BACK`.

    Raises
    ------
    UserError
        If there is but one sample of a kind.
    """
    held = set()
    for kind in sorted(set(kinds)):
        numbers = [number for number, other in enumerate(kinds) if other == kind]
        if len(numbers) < 2:
            raise UserError(
                f"params.yaml: end_to_end needs two calibration samples of each kind, one to tune on "
                f"and one to see whether that helped; the set has one {kind}: draw more, or none"
            )
        held.update(numbers[::HELD_BACK])
    return held


def draw_steps(kinds: Sequence[str], numbers: Sequence[int], seed: int) -> Iterator[list[int]]:
    """Yield the samples of each step, forever: `DRAWN` of each kind, all of it before any again.

    Parameters
    ----------
    kinds
        Of all samples.
    numbers
        Of the samples to draw from.
    seed
        Determines the order.
    """
    source = random.Random(seed)
    by_kind = {kind: [n for n in numbers if kinds[n] == kind] for kind in sorted(set(kinds))}
    queues: dict[str, list[int]] = {kind: [] for kind in by_kind}
    while True:
        step = []
        for kind, members in by_kind.items():
            queue = queues[kind]
            for _ in range(min(DRAWN[kind], len(members))):
                if not queue:
                    queue.extend(source.sample(members, len(members)))
                step.append(queue.pop())
        yield step


def run_layers(
    layers: Sequence[nn.Module], inputs: Sequence[Sample], device: torch.device
) -> torch.Tensor:
    """Return the hidden states [1, tokens, hidden] after all layers, the samples one behind the other.

    Where gradients are needed, only the states between layers are kept.

    Parameters
    ----------
    layers
        Decoder layers that take packs of samples and add their deepstack features themselves.
    inputs
        What the first layer is given for each sample.
    device
        Where.
    """
    (pack,) = pack_samples(list(inputs), len(inputs))
    values = {
        key: value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
        for key, value in pack.items()
    }
    hidden: torch.Tensor = values.pop("hidden_states")
    others = unflatten(values)

    def run(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output: Any = layer(hidden_states=hidden, **others)
        state: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return state

    for layer in layers:
        if torch.is_grad_enabled():
            hidden = checkpoint(run, layer, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = run(layer, hidden)
    return hidden


def sum_losses(
    embeddings: torch.Tensor, targets: Hidden, kinds: Sequence[str]
) -> dict[str, tuple[torch.Tensor, int]]:
    """Return the sum of 1 - cosine over the tokens of each kind, and how many these are.

    Parameters
    ----------
    embeddings
        Unit vectors [1, tokens, embed_dim] of samples one behind the other.
    targets
        Those of the full-precision model, [1, tokens, embed_dim] a sample.
    kinds
        Of the samples.
    """
    expected = torch.cat([target.to(embeddings.device) for target in targets], dim=1)
    # |a - b|^2 / 2 is 1 - cosine of unit vectors, without the rounding error of a number near 1
    wrong = (embeddings - expected).square().sum(-1).flatten() / 2
    sums: dict[str, tuple[torch.Tensor, int]] = {}
    lengths = [target.shape[1] for target in targets]
    for part, kind in zip(torch.split(wrong, lengths), kinds, strict=True):
        total, count = sums.get(kind, (wrong.new_zeros(()), 0))
        sums[kind] = (total + part.sum(), count + len(part))
    return sums


def balance(sums: Mapping[str, tuple[torch.Tensor, int]], before: Losses) -> torch.Tensor:
    """Return the mean over kinds of the loss of the kind's tokens, over what it was before tuning.

    So neither many pages nor coarse queries outweigh the others.

    Parameters
    ----------
    sums
        As `sum_losses` returns them.
    before
        Losses before tuning.
    """
    return torch.stack(
        [total / count / max(before[kind], 1e-12) for kind, (total, count) in sums.items()]
    ).mean()


@dataclass(frozen=True)
class Network:
    """The quantized decoder layers and what follows them.

    Attributes
    ----------
    layers
        Decoder layers; to be tuned, with a `TunedLinear` for each quantized linear and no other
        parameter that needs a gradient.
    tail
        The rest.
    device
        Where both are.
    """

    layers: Sequence[nn.Module]
    tail: Tail
    device: torch.device

    def embed(self, inputs: Sequence[Sample]) -> torch.Tensor:
        """Return unit vectors [1, tokens, embed_dim] of samples one behind the other."""
        embeddings: torch.Tensor = self.tail(run_layers(self.layers, inputs, self.device))
        return embeddings

    @torch.no_grad()
    def losses(
        self, inputs: Sequence[Sample], targets: Hidden, kinds: Sequence[str], numbers: set[int]
    ) -> Losses:
        """Return the loss of each kind over the samples of these numbers."""
        totals: dict[str, list[float]] = {}
        for number in sorted(numbers):
            sums = sum_losses(self.embed([inputs[number]]), [targets[number]], [kinds[number]])
            for kind, (total, count) in sums.items():
                known = totals.setdefault(kind, [0.0, 0])
                known[0] += float(total)
                known[1] += count
        return {kind: total / count for kind, (total, count) in sorted(totals.items())}


@contextmanager
def updated_in_backward(network: Network, recipe: EndToEnd) -> Iterator[Callable[[int], None]]:
    """Have each tuned tensor updated by Adam as soon as a backward pass knows its gradient.

    So no more than one layer's gradients are in memory.

    Yields
    ------
    callable
        Sets the step sizes for a step, counted from 0: they rise during `WARM_UP` and fall to 0.
    """
    optimizers: list[tuple[torch.optim.Optimizer, float]] = []
    handles = []

    def attend(parameter: nn.Parameter, rate: float) -> None:
        optimizer = torch.optim.Adam([parameter], lr=rate, fused=parameter.is_cuda)
        optimizers.append((optimizer, rate))

        def update(_: torch.Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        handle = parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]
        handles.append(handle)

    for layer in network.layers:
        for linear in layer.modules():
            if isinstance(linear, TunedLinear):
                attend(linear.change, recipe.scales_lr)
                if linear.offset.requires_grad:
                    attend(linear.offset, recipe.codes_lr)

    warm_up = max(1, min(WARM_UP, recipe.steps // 10))

    def set_step(step: int) -> None:
        factor = min(1.0, (step + 1) / warm_up) * (1 - step / recipe.steps)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * factor

    try:
        yield set_step
    finally:
        for handle in handles:
            handle.remove()


def tune_end_to_end(
    network: Network,
    inputs: Sequence[Sample],
    targets: Hidden,
    kinds: Sequence[str],
    recipe: EndToEnd,
) -> EndToEndOutcome:
    """Tune the linears of a network, in place, by Adam on the loss of the embeddings.

    The loss of a step is as `balance` gives it.

    Parameters
    ----------
    network
        The quantized model behind its token embeddings and vision tower.
    inputs
        What its first layer is given for each sample.
    targets
        Unit vectors [1, tokens, embed_dim] of the full-precision model for each sample.
    kinds
        ``query``, ``page`` or ``passage`` for each sample.
    recipe
        Steps, step sizes and seed.

    Raises
    ------
    UserError
        If there is but one sample of a kind.
    NonFiniteWeightsError
        If a loss becomes NaN or infinite.
    """
    held = hold_back(kinds)
    tuned_on = set(range(len(kinds))) - held
    before, held_before = (
        network.losses(inputs, targets, kinds, numbers) for numbers in (tuned_on, held)
    )
    if not all(loss < float("inf") for loss in (*before.values(), *held_before.values())):
        raise NonFiniteWeightsError(
            "quantize: the quantized model gives NaN or Inf on the calibration samples before "
            "end-to-end tuning; set end_to_end: null to look at it"
        )
    steps = draw_steps(kinds, sorted(tuned_on), recipe.seed)
    with (
        Progress("end-to-end steps", recipe.steps) as progress,
        updated_in_backward(network, recipe) as set_step,
    ):
        for step in range(recipe.steps):
            set_step(step)
            drawn = next(steps)
            embeddings = network.embed([inputs[number] for number in drawn])
            sums = sum_losses(embeddings, [targets[n] for n in drawn], [kinds[n] for n in drawn])
            loss = balance(sums, before)
            if not loss.isfinite():
                raise NonFiniteWeightsError(
                    f"quantize: end-to-end tuning came to NaN or Inf at step {step + 1} of "
                    f"{recipe.steps}; set smaller step sizes in end_to_end"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            progress.advance()
    after, held_after = (
        network.losses(inputs, targets, kinds, numbers) for numbers in (tuned_on, held)
    )
    if not all(loss < float("inf") for loss in (*after.values(), *held_after.values())):
        raise NonFiniteWeightsError(
            "quantize: end-to-end tuning ended in NaN or Inf; set smaller step sizes in end_to_end"
        )
    return EndToEndOutcome(before, after, held_before, held_after)
