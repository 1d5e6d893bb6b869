"""What quantizing one part of the model alone does to its embeddings, part by part and by bits.

Calibration samples run through the model one decoder layer at a time, all in one pack. Every part
at every width is a variant with hidden states of its own: it begins where its part stands, and each
later layer is loaded once and run on all variants. Memory holds the front of the model or one
layer, whatever the model's size, and all variants' states.

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
from stages.quantization.activations import Hidden, Sample, layer_outputs
from stages.quantization.budget import items_of
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


def parts_of(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the parts to measure: name -> names of its modules.

    Those that a budget chooses widths for, and each block of the vision tower.
    """
    parts = items_of(config)
    for name in vision_linears(config):
        place, _, rest = name.removeprefix(f"{VISION}.").partition(".")
        if place == "blocks":
            key = f"vision_block.{rest.partition('.')[0]}"
            parts[key] = (*parts.get(key, ()), name)
    return parts


@contextmanager
def quantized(
    module: Any,
    names: Sequence[str],
    bits: int,
    group_size: int,
    hessians: Mapping[str, torch.Tensor],
) -> Iterator[None]:
    """Quantize some weights of a module for the time of the context.

    Parameters
    ----------
    module
        What holds them.
    names
        Of the linears, or of the token embeddings, within it.
    bits, group_size
        How.
    hessians
        Of the inputs of each linear, see `watch_hessians`; what has none is rounded to nearest.
    """
    kept = {}
    try:
        for name in names:
            weight = module.get_submodule(name).weight
            kept[name] = weight.data
            if name in hessians:
                codes, scales = quantize_weight(weight.data, hessians[name], bits, group_size)
            else:
                codes, scales = round_to_nearest(weight.data, bits, group_size)
            weight.data = dense_weight(codes, scales).to(weight.dtype)
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
    parts = parts_of(config)
    outside = {
        part: names for part, names in parts.items() if not names[0].startswith(f"{BLOCKS}.")
    }
    order = pack_order(len(samples))
    tower = front.vlm.model.visual
    with watch_hessians(tower) as seen:
        base = capture(front, samples, len(samples))[0]
    hessians = {f"{VISION}.{name}": hessian for name, hessian in seen.items()}
    lengths = base["lengths"].flatten().tolist()
    states: dict[Variant, Hidden] = {}
    features: dict[Variant, torch.Tensor] = {}
    with Progress("parts before the decoder", len(outside) * len(BITS)) as progress:
        for part, names in outside.items():
            for bits in BITS:
                with quantized(front, names, bits, group_size, hessians):
                    given = capture(front, samples, len(samples))[0]
                states[Variant(part, bits)] = [given["hidden_states"]]
                if part != "token_embeddings":
                    features[Variant(part, bits)] = given["deepstack"]
                progress.advance()
    hessians.clear()
    norm, projection = front.vlm.model.language_model.norm, front.embedding_proj_layer
    original: Hidden = [base["hidden_states"]]
    with Progress("decoder layers", count) as progress:
        for index in range(count):
            layer = load_layer(front, index).to(device)
            prefix = f"{BLOCKS}.{index}."
            for variant, state in states.items():
                inputs = {**base, "deepstack": features.get(variant, base["deepstack"])}
                states[variant] = _advance(layer, inputs, state, device)
            with watch_hessians(layer) as own:
                after = _advance(layer, base, original, device)
            for part, names in parts.items():
                if not names[0].startswith(prefix):
                    continue
                inside = [name.removeprefix(prefix) for name in names]
                for bits in BITS:
                    with quantized(layer, inside, bits, group_size, own):
                        state = _advance(layer, base, original, device)
                    states[Variant(part, bits)] = state
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
        for place, tokens in zip(order, apart, strict=True):
            by_kind.setdefault(kinds[place], []).append(tokens)
        losses.setdefault(variant.part, {})[str(variant.bits)] = {
            kind: float(torch.cat(tokens).mean()) for kind, tokens in sorted(by_kind.items())
        }
    return losses


def pack_order(count: int) -> list[int]:
    """Return the samples of the one pack in their order: `pack_samples` keeps it."""
    return list(range(count))


def _advance(
    layer: torch.nn.Module, inputs: Sample, hidden: Hidden, device: torch.device
) -> Hidden:
    """Return the output of a layer on the CPU."""
    return [output.cpu() for output in layer_outputs(layer, [inputs], hidden, device)]
