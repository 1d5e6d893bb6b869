"""What the steps that have the whole language model in memory take, compared with what there is."""

import math
from collections.abc import Container, Sequence

import torch

from colqwen3.system.device import memory_of
from colqwen3.system.errors import UserError
from stages.quantization.model_hessians import effects_bytes
from stages.quantization.recipes import AnyRecipe, GptqRecipe, RtnRecipe
from stages.quantization.tuning import INPUTS
from stages.quantization.whole_model import TUNED

CODE_BYTES, TUNED_BYTES = 1, 12
"""Of a weight tuned end to end: its code, and where codes are tuned the real number and Adam's two."""
FLOAT_BYTES = 4
FIXES = {
    "end_to_end": "set it to null, or codes_lr: 0 in it, which takes a thirteenth",
    "hessian": "leave it out",
}
DONE = {"end_to_end": TUNED, "hessian": INPUTS}
"""Files of an interrupted run that tell that the step of a key is behind it."""


class TooLittleMemoryError(UserError, MemoryError):
    """The language model does not fit into memory as a recipe needs it."""


def memory_needed(recipe: AnyRecipe, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Return the bytes that keys of a recipe need at least, without activations.

    Parameters
    ----------
    recipe
        The recipe.
    shapes
        [out_features, in_features] of each quantized linear of the decoder layers.
    """
    needed: dict[str, int] = {}
    weights = sum(map(math.prod, shapes))
    if isinstance(recipe, GptqRecipe) and recipe.hessian == "model":
        outputs = [shape[0] for shape in shapes]
        needed["hessian"] = FLOAT_BYTES * weights + effects_bytes(outputs, tokens=0)
    if not isinstance(recipe, RtnRecipe) and recipe.end_to_end:
        tuned = recipe.end_to_end.codes_lr > 0
        needed["end_to_end"] = weights * (CODE_BYTES + TUNED_BYTES * tuned)
    return needed


def check_memory(
    name: str,
    recipe: AnyRecipe,
    shapes: Sequence[Sequence[int]],
    device: torch.device,
    done: Container[str] = (),
) -> None:
    """Compare what a recipe needs with the memory of a device.

    Parameters
    ----------
    name
        Of the recipe, for the message.
    recipe, shapes
        As of `memory_needed`.
    device
        Where.
    done
        Files that an interrupted run left.

    Raises
    ------
    TooLittleMemoryError
        If it cannot fit.
    """
    for key, needed in memory_needed(recipe, shapes).items():
        there = memory_of(device)
        if needed > there and DONE[key] not in done:
            raise TooLittleMemoryError(
                f"params.yaml: recipes.{name}.{key} needs more than {needed / 1e9:.1f} GB of memory for "
                f"this model, and there are {there / 1e9:.1f} GB; {FIXES[key]}, or take another recipe"
            )
