"""How many arithmetic operations a ColQwen3 takes: the floor under any measured time.

A multiplication and an addition count as two operations. Matrix products and attention are
counted; norms, activations and rotations, which take little, are not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from colqwen3.checkpoint import layout

Config = Mapping[str, Any]


def text_operations(config: Config, tokens: int) -> int:
    """Return the operations of the decoder layers and the projection on one sequence."""
    text = config["text_config"]
    linears: int = sum(math.prod(shape) for shape in layout.linears(config).values())
    linears += config["embed_dim"] * text["hidden_size"]
    width: int = text["num_attention_heads"] * text["head_dim"]
    # scores and their weighted sum, 2 x 2 operations a pair; causal: half of the pairs
    attention: int = 2 * tokens**2 * width * text["num_hidden_layers"]
    return 2 * linears * tokens + attention


def vision_operations(config: Config, patches: int) -> int:
    """Return the operations of the vision tower on one page."""
    vision = config["vision_config"]
    merged = patches // vision["spatial_merge_size"] ** 2
    total: int = 4 * patches**2 * vision["hidden_size"] * vision["depth"]  # attention
    for name, shape in layout.tensors(config).items():
        if layout.component(name) == "vision" and len(shape) > 1 and ".pos_embed." not in name:
            rows = merged if "merger" in name else patches
            total += 2 * math.prod(shape) * rows
    return total


def page_operations(config: Config, tokens: int, visual_tokens: int) -> int:
    """Return the operations of embedding one page."""
    patches = visual_tokens * config["vision_config"]["spatial_merge_size"] ** 2
    return text_operations(config, tokens) + vision_operations(config, patches)


def tuning_operations(
    config: Config, tokens: Sequence[int], iters: int, samples_per_iter: int
) -> int:
    """Return the operations of AutoRound on all decoder layers, the vision tower left out.

    An iteration takes a forward and a backward (twice a forward: gradients of inputs and of
    weights) of each of its samples; two more forwards of all samples give the outputs in full
    precision and once quantized.

    Parameters
    ----------
    config
        Of the model.
    tokens
        Length of each calibration sample.
    iters
        Iterations a layer.
    samples_per_iter
        Samples of one iteration, drawn from all alike.
    """
    forward = sum(text_operations(config, count) for count in tokens)
    drawn = min(samples_per_iter, len(tokens))
    return round(forward * (2 + 3 * iters * drawn / len(tokens)))
