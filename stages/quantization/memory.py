"""What the steps that have the whole language model in memory take, compared with what there is."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from colqwen3.system.device import memory_of
from colqwen3.system.errors import UserError
from stages.quantization.end_to_end import draw_steps, hold_back
from stages.quantization.linears import Job
from stages.quantization.model_hessians import effects_bytes
from stages.quantization.recipes import AnyRecipe, EndToEnd, GptqRecipe, RtnRecipe
from stages.quantization.sample_packs import deal
from stages.quantization.tuning import INPUTS
from stages.quantization.whole_model import TUNED

CODE_BYTES, TUNED_BYTES = 1, 12
"""Of a weight tuned end to end: its code, and where codes are tuned the real number and Adam's two."""
FLOAT_BYTES = 4
FIXES = {
    "end_to_end": "set it to null, or codes_lr: 0 in it, which takes a thirteenth for weights",
    "hessian": "leave it out",
}
DONE = {"end_to_end": TUNED, "hessian": INPUTS}
"""Files of an interrupted run that tell that the step of a key is behind it."""


class TooLittleMemoryError(UserError, MemoryError):
    """The language model does not fit into memory as a recipe needs it."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and of its calibration samples that the memory of a step depends on.

    Attributes
    ----------
    layers
        [out_features, in_features] of the quantized linears of each decoder layer.
    hidden
        Width of a hidden state.
    deepstack
        Number of layers that a sample brings features for.
    tokens, kinds
        Length and kind of each sample.
    """

    layers: Sequence[Sequence[Sequence[int]]]
    hidden: int
    deepstack: int
    tokens: Sequence[int]
    kinds: Sequence[str]

    def activations(self, tokens: int) -> int:
        """Return the bytes of what a backward pass over so many tokens holds at least, in float32.

        That is the state before each layer and after the last, the deepstack features, and what the
        linears of one layer gave.
        """
        states = len(self.layers) + 1 + self.deepstack
        outputs = max(sum(shape[0] for shape in layer) for layer in self.layers)
        return FLOAT_BYTES * tokens * (states * self.hidden + outputs)


def sizes_of(job: Job, config: Mapping[str, Any]) -> Sizes:
    """Return the sizes of a job by the config.json of its model."""
    tensors = job.source.tensors
    return Sizes(
        [[tensors[f"{name}.weight"].shape for name in names] for names in job.allocation.layers],
        int(config["text_config"]["hidden_size"]),
        len(config["vision_config"]["deepstack_visual_indexes"]),
        [sample["input_ids"].numel() for sample in job.samples],
        job.kinds,
    )


def memory_needed(recipe: AnyRecipe, sizes: Sizes) -> dict[str, int]:
    """Return the bytes that keys of a recipe need at least, for weights and activations.

    Raises
    ------
    UserError
        If there is but one sample of a kind to tune end to end on.
    """
    needed: dict[str, int] = {}
    shapes = [shape for layer in sizes.layers for shape in layer]
    weights = sum(map(math.prod, shapes))
    if isinstance(recipe, GptqRecipe) and recipe.hessian == "model":
        needed["hessian"] = (
            FLOAT_BYTES * weights
            + effects_bytes([shape[0] for shape in shapes], tokens=0)
            + sizes.activations(max(map(sum, deal(sizes.tokens, recipe.batch_size)), default=0))
        )
    if not isinstance(recipe, RtnRecipe) and recipe.end_to_end:
        a_weight = CODE_BYTES + TUNED_BYTES * (recipe.end_to_end.codes_lr > 0)
        longest = longest_step(sizes.tokens, sizes.kinds, recipe.end_to_end)
        needed["end_to_end"] = a_weight * weights + sizes.activations(longest)
    return needed


def longest_step(tokens: Sequence[int], kinds: Sequence[str], recipe: EndToEnd) -> int:
    """Return the maximum number of tokens in a step of end-to-end tuning."""
    tuned_on = sorted(set(range(len(kinds))) - hold_back(kinds))
    steps = islice(draw_steps(kinds, tuned_on, recipe.seed), recipe.steps)
    return max(sum(tokens[number] for number in drawn) for drawn in steps)


def check_memory(
    name: str,
    recipe: AnyRecipe,
    sizes: Sizes,
    device: torch.device,
    done: Container[str] = (),
) -> None:
    """Compare what a recipe needs with the memory of a device.

    Parameters
    ----------
    name
        Of the recipe, for the message.
    recipe, sizes
        As of `memory_needed`.
    device
        Where.
    done
        Files that an interrupted run left.

    Raises
    ------
    TooLittleMemoryError
        If it cannot fit.
    UserError
        If there is but one sample of a kind to tune end to end on.
    """
    for key, needed in memory_needed(recipe, sizes).items():
        there = memory_of(device)
        if needed > there and DONE[key] not in done:
            raise TooLittleMemoryError(
                f"params.yaml: recipes.{name}.{key} needs more than {needed / 1e9:.1f} GB of memory for "
                f"this model, and there are {there / 1e9:.1f} GB; {FIXES[key]}, or take another recipe"
            )
