"""Shapes that the demonstration retriever can be trained in, smallest to largest.

All have the vocabulary, the head size of the text tower and the width of the embeddings in common,
and text widths that groups of 128 weights divide (``micro``, for trying programs out, needs 64).
"""

from dataclasses import dataclass, field

from demo.training.network import CELL, COPIES, PATCH, Shape

POSITIONS = 2304
MLP = 4
"""How much wider the vision tower's MLP is than its blocks."""


@dataclass(frozen=True)
class Size:
    """A shape, and what its training changes in a preset of `demo.training.train`.

    Attributes
    ----------
    shape : Shape
        The sizes of the model.
    rate : float
        What to multiply the preset's peak learning rate by; less for a larger model.
    batch : float
        What to multiply the preset's patches in a batch by.
    warm_ups : tuple of (float, float)
        Fractions of the training at which a warm-up of the learning rate begins, and how much of
        the training it takes.  The text tower gets its first gradient after 0.13 of it.
    """

    shape: Shape = field(default_factory=Shape)
    rate: float = 1.0
    batch: float = 1.0
    warm_ups: tuple[tuple[float, float], ...] = ((0.0, 0.02),)


SIZES = {
    "micro": Size(
        Shape(
            hidden=64,
            layers=2,
            heads=1,
            kv_heads=1,
            intermediate=64,
            vision_hidden=32,
            vision_depth=2,
            deepstack=(0, 1),
        )
    ),
    "1m": Size(
        Shape(
            hidden=128,
            layers=3,
            heads=2,
            kv_heads=1,
            intermediate=256,
            vision_hidden=64,
        ),
        rate=1.33,
        batch=1 / 3,
    ),
    "demo": Size(),
    "39m": Size(
        Shape(
            hidden=512,
            layers=8,
            heads=8,
            kv_heads=4,
            intermediate=1536,
            vision_hidden=256,
            vision_depth=8,
            vision_heads=8,
            deepstack=(1, 3, 5),
        )
    ),
    "150m": Size(
        Shape(
            hidden=768,
            layers=16,
            heads=12,
            kv_heads=6,
            intermediate=2304,
            vision_hidden=384,
            vision_depth=12,
            vision_heads=12,
            deepstack=(2, 5, 8),
        ),
        rate=0.5,
        batch=2 / 3,
        warm_ups=((0.0, 0.03), (0.13, 0.04)),
    ),
}


def count_parameters(shape: Shape) -> dict[str, int]:
    """Return the parameters of the vision tower, the text tower and the projection."""
    hidden, width = shape.hidden, shape.vision_hidden
    block = (MLP * 2 + 4) * width**2 + (MLP + 9) * width
    merged = (CELL // PATCH) ** 2 * width
    merger = merged * (merged + 1) + hidden * (merged + 1)
    vision = (
        (COPIES * PATCH**2 + 1) * width
        + POSITIONS * width
        + shape.vision_depth * block
        + (merger + 2 * width)
        + len(shape.deepstack) * (merger + 2 * merged)
    )
    attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * hidden + 2 * shape.head_dim
    layer = attention + 3 * hidden * shape.intermediate + 2 * hidden
    return {
        "vision": vision,
        "text": shape.vocab * hidden + shape.layers * layer + hidden,
        "projection": (hidden + 1) * shape.embed_dim,
    }
