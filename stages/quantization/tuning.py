"""Tuning the decoder layers one at a time, on inputs that are the full model's own.

The front of the model (vision tower, token embeddings, deepstack mergers) runs once over the
calibration samples and gives the inputs of the first layer; each layer is then loaded, quantized by
AutoRound or GPTQ and dropped, so that memory holds one layer whatever the model's size; what GPTQ by
the whole model needs is measured before the first. A layer's output in full precision and its output
once quantized are the next layer's inputs; they are kept on disk, so that a killed run goes on where
it stopped.
"""

import copy
import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from colqwen3.checkpoint.packing import dense_weight, round_to_nearest
from colqwen3.system.errors import NonFiniteWeightsError, UserError
from colqwen3.system.files import digest_file
from colqwen3.system.progress import Progress
from colqwen3.system.resume import Scratch
from stages.quantization.activations import (
    Hidden,
    Sample,
    capture_inputs,
    layer_outputs,
    output_error,
    read_states,
    write_states,
)
from stages.quantization.autoround import run_autoround
from stages.quantization.gptq import effect_error, run_gptq
from stages.quantization.model_hessians import Effects, read_effects, write_effects
from stages.quantization.recipes import GptqRecipe, TunedRecipe
from stages.quantization.sample_packs import pack_samples

logger = logging.getLogger(__name__)

INPUTS = "inputs.safetensors"
QUANTIZED_INPUTS = "quantized-inputs.safetensors"
TOWER = "vision-tower.json"
"""What is known of a vision tower that is finished."""
EFFECTS = "effects-{:05d}.safetensors"
"""What errors of the linears of a layer do to the final embeddings."""
FRONT = (TOWER, INPUTS, QUANTIZED_INPUTS, EFFECTS.partition("{")[0])
"""Starts of the names of what is kept until all layers are done."""
CHAIN = "chain-{:05d}.safetensors"
NOT_FINITE = 1e9
"""Recorded in place of an error that is NaN or Inf, which JSON does not have."""


Bits = Mapping[str, int]
"""Name of a linear within a layer -> its bits."""


@dataclass(frozen=True)
class Outcome:
    """Output error of one decoder layer over all calibration samples, both ways.

    Each is the norm of the difference to the full-precision layer's output, divided by the norm of
    that output; both layers are given the same inputs, those that the quantized model gives them. With
    GPTQ by the whole model it is `gptq.effect_error` instead.

    Attributes
    ----------
    tuned
        Of the layer as tuning left it; `NOT_FINITE` if its output holds NaN or Inf.
    rounded
        Of the layer with its linears rounded to nearest.
    """

    tuned: float
    rounded: float

    @property
    def tuning_won(self) -> bool:
        """Whether the tuned layer is kept: it is at least as good as the rounded one."""
        return self.tuned <= self.rounded


def tune_layer(
    layer: nn.Module,
    inputs: Sequence[Sample],
    hidden: Hidden,
    quantized: Hidden | None,
    recipe: TunedRecipe,
    bits: Bits,
    device: torch.device,
    effects: Effects | None = None,
) -> tuple[Hidden, Hidden | None, Outcome]:
    """Quantize one decoder layer in place: tuned by the recipe, or rounded where that is better.

    Its linears then hold rounded weights and ``scale`` [out_features, groups].

    Parameters
    ----------
    layer
        The layer.
    inputs
        What each sample gives the layer besides hidden states.
    hidden
        Input of the layer in the full-precision model.
    quantized
        Input of the layer once what comes before it is quantized; None for the first if nothing
        does, and without tuning.
    recipe
        How to tune.
    bits
        Bits of each linear by its name in the layer.
    device
        Where.
    effects
        Of the layer's linears, for GPTQ by the whole model.

    Returns
    -------
    tuple
        Outputs of the layer before and after, each fit to be the next layer's input (None for the
        latter without tuning, which never looks at it), and the errors of both ways.

    Raises
    ------
    SamplesLostError
        If AutoRound lost a sample.
    NonFiniteWeightsError
        If even the rounded layer gives NaN or Inf.
    """
    rounded = copy.deepcopy(layer)
    given = hidden if quantized is None else quantized
    before: Hidden | None
    after: Hidden | None
    hessians: dict[str, torch.Tensor] = {}
    if isinstance(recipe, GptqRecipe):
        before, after, hessians = run_gptq(
            layer, inputs, hidden, quantized, recipe, bits, device, effects
        )
    else:
        before, after = run_autoround(layer, inputs, hidden, quantized, recipe, bits, device)
    if before is None:  # without tuning, AutoRound needs no data at 8 bits
        before = list(layer_outputs(rounded, inputs, hidden, device))
    error: Callable[[nn.Module], float]
    if effects is None:
        error = partial(_output_error, inputs=inputs, given=given, before=before, device=device)
    else:  # outputs are not what it minimises
        linears: dict[str, Any] = {name: rounded.get_submodule(name) for name in bits}
        original = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        error = partial(effect_error, original=original, hessians=hessians, effects=effects)
    scales = round_layer(rounded.to(device), bits, recipe.group_size)
    tuned_error, rounded_error = error(layer), error(rounded)
    if not math.isfinite(rounded_error):
        raise NonFiniteWeightsError(
            "quantize: a decoder layer gives NaN or Inf on the calibration samples even when rounded; "
            "fetch the model again"
        )
    outcome = Outcome(tuned_error if math.isfinite(tuned_error) else NOT_FINITE, rounded_error)
    if not outcome.tuning_won:
        for name, scale in scales.items():
            module: Any = layer.get_submodule(name)
            weight: Any = rounded.get_submodule(name).weight
            module.weight.data.copy_(weight)
            module.scale = scale
        if after is not None:
            after = list(layer_outputs(layer, inputs, given, device))
    return before, after, outcome


def _output_error(
    layer: nn.Module,
    inputs: Sequence[Sample],
    given: Hidden,
    before: Hidden,
    device: torch.device,
) -> float:
    return output_error(layer_outputs(layer, inputs, given, device), before)


@torch.no_grad()
def round_layer(layer: nn.Module, bits: Bits, group_size: int) -> dict[str, torch.Tensor]:
    """Round the linears of a layer to nearest in place; return their scales [out_features, groups]."""
    scales = {}
    for name, width in bits.items():
        module: Any = layer.get_submodule(name)
        codes, scale = round_to_nearest(module.weight, width, group_size)
        module.weight.copy_(dense_weight(codes, scale))
        scales[name] = scale
    return scales


def tune_layers(
    samples: Sequence[Sample],
    recipe: TunedRecipe,
    device: torch.device,
    scratch: Scratch,
    load_front: Callable[[], Any],
    load_layer: Callable[[Any, int], nn.Module],
    widths: Sequence[Bits],
    quantize_front: Callable[[Any], None] | None = None,
    find_effects: Callable[[Sequence[Sample]], Sequence[Effects]] | None = None,
) -> Iterator[tuple[int, nn.Module, dict[str, str], Outcome]]:
    """Tune the decoder layers from the first that `scratch` does not know as done.

    Parameters
    ----------
    samples
        Calibration samples, each the arguments of one forward.
    recipe
        How to tune.
    device
        Where.
    scratch
        Keeps the inputs of the next layer.
    load_front
        Gives the model up to its first decoder layer, ``vlm.model.language_model.layers[0]``.
    load_layer
        Gives a decoder layer by the front and its number.
    widths
        Bits of the linears of each decoder layer, by their names in it.
    quantize_front
        Gives the front, in place, the weights that it has in the quantized model; None if they are
        the original's.
    find_effects
        Gives what errors of the linears of each layer do, by the inputs of the first, for GPTQ by the
        whole model.

    Yields
    ------
    tuple
        Number of the layer, the layer as `tune_layer` leaves it, the files to keep in the scratch
        once its result is stored, and the errors of both ways.

    Raises
    ------
    SamplesLostError
        If a sample is lost.
    """
    front = load_front()
    path = scratch.folder / INPUTS
    if INPUTS not in scratch.files:
        write_states(path, capture(front, samples, recipe.batch_size))
        kept = _kept(scratch)
        kept[INPUTS] = digest_file(path)
        if find_effects is not None:
            for index, effects in enumerate(find_effects(read_states(path))):
                effects_path = scratch.folder / EFFECTS.format(index)
                write_effects(effects_path, effects)
                kept[effects_path.name] = digest_file(effects_path)
                del effects  # a generator's names live until it ends
        if quantize_front is not None:
            quantize_front(front)
            quantized_path = scratch.folder / QUANTIZED_INPUTS
            write_states(quantized_path, capture(front, samples, recipe.batch_size))
            kept[QUANTIZED_INPUTS] = digest_file(quantized_path)
        scratch.record(kept)
    kept = _kept(scratch)
    inputs = read_states(path)
    shifts = None
    if quantize_front is not None:
        given = read_states(scratch.folder / QUANTIZED_INPUTS)
        if "deepstack" in inputs[0]:
            pairs = zip(given, inputs, strict=True)
            shifts = [item["deepstack"] - full["deepstack"] for item, full in pairs]
    front = front.to("meta")  # only its classes and config are needed from here
    # AutoRound collects garbage many times a layer; what is loaded by now need not be looked at
    gc.freeze()
    start = len(scratch.steps)
    quantized: Hidden | None
    if start:
        states = read_states(scratch.folder / CHAIN.format(start - 1))
        hidden = [state["full"] for state in states]
        quantized = [s["quantized"] for s in states] if "quantized" in states[0] else None
    else:
        hidden, quantized = [sample["hidden_states"] for sample in inputs], None
        if quantize_front is not None:
            quantized = [sample["hidden_states"] for sample in given]
    with Progress("decoder layers", len(widths), start) as progress:
        for index in range(start, len(widths)):
            layer = load_layer(front, index)
            found: tuple[Effects, ...] = ()
            if find_effects is not None:
                found = (read_effects(scratch.folder / EFFECTS.format(index)),)
            hidden, quantized, outcome = tune_layer(
                layer, inputs, hidden, quantized, recipe, widths[index], device, *found
            )
            if shifts is not None and quantized is not None:
                quantized = add_shifts(quantized, shifts, index)
            if not outcome.tuning_won:
                warn_of_rounding(f"layer {index}", outcome)
            chain = scratch.folder / CHAIN.format(index)
            states = [{"full": state} for state in hidden]
            for item, state in zip(states, quantized or (), strict=quantized is not None):
                item["quantized"] = state
            write_states(chain, states)
            files = {**kept, chain.name: digest_file(chain)}
            yield index, layer, files, outcome
            progress.advance()


def _kept(scratch: Scratch) -> dict[str, str]:
    """Return the files of the scratch that all layers need, and their digests."""
    return {name: digest for name, digest in scratch.files.items() if name.startswith(FRONT)}


def warn_of_rounding(name: str, outcome: Outcome) -> None:
    """Say that a layer is rounded, since tuning made it worse."""
    logger.warning(
        "%s: tuning made the output worse than rounding (error %.4g against %.4g); it is rounded instead",
        name, outcome.tuned, outcome.rounded,
    )  # fmt: skip


def capture(front: Any, samples: Sequence[Sample], batch_size: int) -> list[Sample]:
    """Return what the first decoder layer is given for each sample, or each pack of `batch_size`."""
    captured = capture_inputs(front, front.vlm.model.language_model.layers[0], samples)
    return pack_samples(captured, batch_size) if batch_size > 1 else captured


def add_shifts(quantized: Hidden, shifts: Sequence[torch.Tensor], index: int) -> Hidden:
    """Add what the quantized front changes in the deepstack features that layer `index` adds.

    Both ways of a layer are given the features of the full-precision front, since they cancel out
    of the error of its output; the next layer's input in the quantized model has the other ones.

    Parameters
    ----------
    quantized
        Outputs [1, tokens, hidden] of the quantized layer.
    shifts
        Differences [1, layers, tokens, hidden] of the dense features.
    index
        Number of the layer.
    """
    if index >= shifts[0].shape[1]:
        return quantized
    return [
        state + shift[:, index].to(state) for state, shift in zip(quantized, shifts, strict=True)
    ]


def check_quantized(layer: nn.Module, which: str, planned: set[str]) -> None:
    """Compare the linears that were quantized in a layer with the planned ones.

    Parameters
    ----------
    layer
        The layer after `tune_layer`.
    which
        What it is, for the error.
    planned
        Names of the linears to quantize within the layer.

    Raises
    ------
    UserError
        Naming the first linear that was left out or quantized beyond the plan.
    """
    quantized = {name for name, module in layer.named_modules() if hasattr(module, "scale")}
    for name in sorted(quantized ^ planned):
        problem = "quantized but not planned" if name in quantized else "planned but not quantized"
        raise UserError(f"quantize: {name} of {which} was {problem}; the log above may say why")
