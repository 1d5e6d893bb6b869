"""Deepstack inside the decoder layers, so that block-wise tuning sees the true activations.

Qwen3-VL adds visual features to the hidden state between the first text layers (DeepStack, Meng et
al., 2024, arXiv:2406.04334). A tool that tunes block by block chains the outputs of blocks and
misses what happens between them: from the second layer on it would tune a page's visual tokens on
activations that never occur. Here each layer adds its share to its own output instead. The model's
output stays the same to the last bit.
"""

from typing import Any

import torch

KEYWORD = "deepstack"


def fold_deepstack(model: Any) -> None:
    """Move the addition of deepstack features into the decoder layers of a ColQwen3, for good.

    The text model scatters the features into one dense tensor [batch, layers, tokens, hidden],
    zeros on text, and hands it to every layer as the keyword ``deepstack``. A tool that records a
    layer's inputs records it with the rest, one row a sample, and replays it. It takes
    ``layers x tokens x hidden`` numbers a sample, so it is meant for calibration, not for serving.

    Parameters
    ----------
    model
        A `ColQwen3`; its forward must not have been wrapped yet.
    """
    text = model.vlm.model.language_model
    count = len(model.config.vision_config.deepstack_visual_indexes)

    def scatter(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = kwargs["inputs_embeds"]
        mask = kwargs.pop("visual_pos_masks", None)
        features = kwargs.pop("deepstack_visual_embeds", None)
        dense = hidden.new_zeros(hidden.shape[0], count, *hidden.shape[1:])
        for index, feature in enumerate(features or ()):
            dense[:, index][mask] = feature.to(dense)
        return args, {**kwargs, KEYWORD: dense}

    text.register_forward_pre_hook(scatter, with_kwargs=True)
    for index, layer in enumerate(text.layers):
        fold_into_layer(layer, index)


def fold_into_layer(layer: Any, index: int) -> None:
    """Have decoder layer number `index` add its share of the keyword ``deepstack`` to its output.

    A layer without a share is left alone by the forward.
    """

    def add(_: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        dense: torch.Tensor = kwargs[KEYWORD]
        return output + dense[:, index].to(output) if index < dense.shape[1] else output

    layer.register_forward_hook(add, with_kwargs=True)
