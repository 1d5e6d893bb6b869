"""Tuning the vision tower: its blocks and mergers one at a time, on the inputs that they really have.

As `stages.quantization.tuning` does for the decoder layers: a block's output in full precision and
its output once quantized are the next one's inputs, and a merger is given those of the block before
it. Only pages take part, one a step whatever the recipe's batch size: it has thousands of patches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from colqwen3.checkpoint.layout import VISION
from colqwen3.system.progress import Progress
from stages.quantization.activations import Hidden, Sample, SamplesLostError, layer_outputs
from stages.quantization.recipes import TunedRecipe
from stages.quantization.tuning import Outcome, tune_layer

INNER = "inner"


class Wrapped(nn.Module):
    """A block or merger of the tower behind the interface of a decoder layer.

    Takes and returns hidden states [1, patches or tokens, width].
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run it."""
        output: torch.Tensor = self.inner(hidden_states[0], **kwargs)
        return output.unsqueeze(0)


@dataclass(frozen=True)
class Tuned:
    """One module of the tower after tuning.

    Attributes
    ----------
    name
        Its name in the model.
    layer
        It, with rounded weights and ``scale`` in the linears that were tuned.
    prefix
        What the name of a linear within ``layer`` starts with.
    outcome
        Errors of its output, tuned and rounded.
    """

    name: str
    layer: nn.Module
    prefix: str
    outcome: Outcome


@torch.no_grad()
def capture_blocks(tower: Any, samples: Sequence[Sample]) -> list[Sample]:
    """Return what the first block is given for each page.

    Raises
    ------
    SamplesLostError
        If there are no pages.
    """
    pages = [sample for sample in samples if "pixel_values" in sample]
    if not pages:
        raise SamplesLostError(
            "the calibration set has no pages, which tuning the vision tower needs; add pages to it, "
            "or give the recipe vision: 16"
        )
    caught: list[Sample] = []

    def catch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first, second = kwargs["position_embeddings"]
        caught.append(
            {
                "hidden_states": args[0].unsqueeze(0).cpu(),
                "cu_seqlens": kwargs["cu_seqlens"].cpu(),
                "position_embeddings.0": first.cpu(),
                "position_embeddings.1": second.cpu(),
            }
        )

    handle = tower.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    weight = tower.pos_embed.weight
    try:
        for page in pages:
            pixels, grid = (
                page[key].to(weight.device) for key in ("pixel_values", "image_grid_thw")
            )
            tower(pixels.to(weight.dtype), grid_thw=grid)
    finally:
        handle.remove()
    return caught


def tune_vision(
    tower: Any,
    samples: Sequence[Sample],
    recipe: TunedRecipe,
    bits: Mapping[str, int],
    device: torch.device,
) -> Iterator[Tuned]:
    """Tune the linears of blocks and mergers that are to be quantized, in the order of the forward.

    Parameters
    ----------
    tower
        The vision tower of the original model; its modules are changed in place.
    samples
        Calibration samples, each the arguments of one forward.
    recipe
        How to tune.
    bits
        Name of each linear to quantize in the model -> its bits.
    device
        Where.

    Raises
    ------
    SamplesLostError
        If there are no pages, or a sample is lost.
    """
    inputs = capture_blocks(tower, samples)
    hidden: Hidden = [sample["hidden_states"] for sample in inputs]
    nothing: list[Sample] = [{} for _ in inputs]
    quantized: Hidden | None = None
    total = len(tower.blocks) + 1 + len(tower.deepstack_merger_list)
    with Progress("parts of the vision tower", total) as progress:

        def tune(
            name: str, module: nn.Module, others: Sequence[Sample]
        ) -> tuple[Hidden, Hidden | None, Tuned | None]:
            layer, prefix = Wrapped(module), f"{VISION}.{name}."
            own = {
                f"{INNER}.{linear.removeprefix(prefix)}": width
                for linear, width in bits.items()
                if linear.startswith(prefix)
            }
            progress.advance()
            if own:
                before, after, outcome = tune_layer(
                    layer, others, hidden, quantized, recipe, own, device
                )
                return before, after, Tuned(f"{VISION}.{name}", layer, f"{INNER}.", outcome)
            before = list(layer_outputs(layer, others, hidden, device))
            if quantized is None:
                return before, None, None
            return before, list(layer_outputs(layer, others, quantized, device)), None

        for index, block in enumerate(tower.blocks):
            hidden, quantized, done = tune(f"blocks.{index}", block, inputs)
            if done:
                yield done
            if index in tower.deepstack_visual_indexes:
                place = tower.deepstack_visual_indexes.index(index)
                merger = tower.deepstack_merger_list[place]
                _, _, done = tune(f"deepstack_merger_list.{place}", merger, nothing)
                if done:
                    yield done
        _, _, done = tune("merger", tower.merger, nothing)
        if done:
            yield done
