"""What quantizing one part of the model alone does to its embeddings, part by part and by bits.

Calibration samples run through the model one decoder layer at a time, all in one pack. Every part
at every width is a variant with hidden states of its own: it begins where its part stands, and each
later layer is loaded once and run on all variants. Memory holds the front of the model or one
layer, whatever the model's size, and all variants' states, on a GPU where they fit there.

Linears are quantized by GPTQ, whose losses are close to those of tuning; rounding would tell
otherwise, since what can be made up for differs from part to part. Token embeddings are rounded.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from colqwen3.checkpoint.layout import BITS, BLOCKS, VISION, linears, vision_linears
from colqwen3.checkpoint.packing import dense_weight, round_to_nearest
from colqwen3.system.progress import Progress
from stages.budget.knapsack import fits, items_of
from stages.quantization.activations import Hidden, Sample, layer_outputs
from stages.quantization.gptq import quantize_weight, watch_hessians
from stages.quantization.tuning import capture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """The model with one part quantized.

    Attributes
    ----------
    part
        Name of the part.
    bits
        Its width.
    """

    part: str
    bits: int


def parts_of(config: Mapping[str, Any], group_size: int) -> dict[str, tuple[str, ...]]:
    """Return the parts to measure: name -> names of its modules.

    Those that a budget chooses widths for, and each block of the vision tower, as far as the group
    size divides their inputs.
    """
    parts = items_of(config)
    for name in vision_linears(config):
        place, _, rest = name.removeprefix(f"{VISION}.").partition(".")
        if place == "blocks":
            key = f"vision_block.{rest.partition('.')[0]}"
            parts[key] = (*parts.get(key, ()), name)
    return {part: names for part, names in parts.items() if fits(names, config, group_size)}


Weights = dict[int, dict[str, torch.Tensor]]
"""Bits -> name -> dense weight of that width."""


def quantized_weights(
    module: Any, names: Sequence[str], group_size: int, hessian: torch.Tensor | None
) -> Weights:
    """Return the weights of modules at all widths: one pass of GPTQ over their rows at once.

    Parameters
    ----------
    module
        What holds them.
    names
        Of linears within it that are given the same inputs, or of the token embeddings.
    group_size
        Weights of a row that share one scale.
    hessian
        Of those inputs, see `watch_hessians`; None rounds to nearest.
    """
    weights = [module.get_submodule(name).weight.data for name in names]
    rows = [len(weight) for weight in weights]
    found: Weights = {}
    if hessian is None:
        for bits in BITS:
            rounded = [round_to_nearest(weight, bits, group_size) for weight in weights]
            dense = [dense_weight(*item) for item in rounded]
            found[bits] = dict(zip(names, dense, strict=True))
        return found
    stacked = torch.cat(weights * len(BITS))
    widths = torch.repeat_interleave(torch.tensor(BITS), sum(rows)).to(stacked.device)
    dense_all = dense_weight(*quantize_weight(stacked, hessian, widths, group_size))
    for bits, part in zip(BITS, dense_all.to(stacked.dtype).chunk(len(BITS)), strict=True):
        found[bits] = dict(zip(names, torch.split(part, rows), strict=True))
    return found


@contextmanager
def replaced(module: Any, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give some submodules other weights for the time of the context."""
    kept = {}
    try:
        for name, weight in weights.items():
            parameter = module.get_submodule(name).weight
            kept[name] = parameter.data
            parameter.data = weight.to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, data in kept.items():
            module.get_submodule(name).weight.data = data


@torch.no_grad()
def measure(
    samples: Sequence[Sample],
    kinds: Sequence[str],
    config: Mapping[str, Any],
    group_size: int,
    load_front: Callable[[], Any],
    load_layer: Callable[[Any, int], torch.nn.Module],
    device: torch.device,
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the loss of each part at each width, 1 minus the mean cosine of tokens to the original's.

    Parameters
    ----------
    samples
        Calibration samples, each the arguments of one forward.
    kinds
        ``pages`` or ``queries`` for each sample.
    config
        The model's config.json.
    group_size
        Weights of a row that share one scale.
    load_front, load_layer
        As of `stages.quantization.tuning.tune_layers`; layers attend within samples of a pack.
    device
        Where.

    Returns
    -------
    dict
        Part -> bits -> ``pages`` and ``queries``.
    """
    front = load_front()
    count = len({name.split(".")[4] for name in linears(config)})
    parts = parts_of(config, group_size)
    outside = {
        part: names for part, names in parts.items() if not names[0].startswith(f"{BLOCKS}.")
    }
    tower = front.vlm.model.visual
    with watch_hessians(tower) as seen:
        base = capture(front, samples, len(samples))[0]
    hessians = {f"{VISION}.{name}": hessian for name, hessian in seen.items()}
    lengths = base["lengths"].flatten().tolist()
    variants = len(BITS) * len(parts)
    kept_on = room_for(variants * base["hidden_states"].nbytes, device)
    states: dict[Variant, Hidden] = {}
    features: dict[Variant, torch.Tensor] = {}
    found: dict[str, Weights] = {}
    names_outside = dict.fromkeys(name for names in outside.values() for name in names)
    with Progress("weights before the decoder", len(names_outside)) as progress:
        for name in names_outside:
            found[name] = quantized_weights(front, [name], group_size, hessians.pop(name, None))
            for weights in found[name].values():
                weights[name] = weights[name].cpu()
            progress.advance()
    with Progress("parts before the decoder", len(outside) * len(BITS)) as progress:
        for part, names in outside.items():
            for bits in BITS:
                with replaced(front, {name: found[name][bits][name] for name in names}):
                    given = capture(front, samples, len(samples))[0]
                states[Variant(part, bits)] = [given["hidden_states"].to(kept_on)]
                if part != "token_embeddings":
                    features[Variant(part, bits)] = given["deepstack"]
                progress.advance()
    found.clear()
    norm, projection = front.vlm.model.language_model.norm, front.embedding_proj_layer
    original: Hidden = [base["hidden_states"]]
    with Progress("decoder layers", count) as progress:
        for index in range(count):
            layer = load_layer(front, index).to(device)
            prefix = f"{BLOCKS}.{index}."
            for variant, state in states.items():
                inputs = {**base, "deepstack": features.get(variant, base["deepstack"])}
                states[variant] = _advance(layer, inputs, state, device, kept_on)
            with watch_hessians(layer) as own:
                after = _advance(layer, base, original, device, kept_on)
            for part, names in parts.items():
                if not names[0].startswith(prefix):
                    continue
                inside = [name.removeprefix(prefix) for name in names]
                at_widths = quantized_weights(layer, inside, group_size, own[inside[0]])
                for bits, weights in at_widths.items():
                    with replaced(layer, weights):
                        states[Variant(part, bits)] = _advance(
                            layer, base, original, device, kept_on
                        )
            original = after
            del layer, own
            progress.advance()

    def embed(hidden: Hidden) -> tuple[torch.Tensor, ...]:
        vectors = projection(norm(hidden[0][0].to(device)).to(projection.weight.dtype)).float()
        return torch.split(torch.nn.functional.normalize(vectors, dim=-1), lengths)

    expected = embed(original)
    losses: dict[str, dict[str, dict[str, float]]] = {}
    for variant, state in states.items():
        pairs = zip(embed(state), expected, strict=True)
        apart = [1 - (actual * wanted).sum(-1).double() for actual, wanted in pairs]
        by_kind: dict[str, list[torch.Tensor]] = {}
        for place, tokens in enumerate(apart):
            by_kind.setdefault(kinds[place], []).append(tokens)
        losses.setdefault(variant.part, {})[str(variant.bits)] = {
            kind: float(torch.cat(tokens).mean()) for kind, tokens in sorted(by_kind.items())
        }
    return losses


def room_for(nbytes: int, device: torch.device) -> torch.device:
    """Return where to keep so many bytes: the device if they take at most half of what is free."""
    if device.type == "cuda" and nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return torch.device("cpu")
    return device


def _advance(
    layer: torch.nn.Module,
    inputs: Sample,
    hidden: Hidden,
    device: torch.device,
    kept_on: torch.device,
) -> Hidden:
    """Return the output of a layer, where it is to be kept."""
    return [output.to(kept_on) for output in layer_outputs(layer, [inputs], hidden, device)]
