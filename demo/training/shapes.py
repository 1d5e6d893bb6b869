"""Shapes that the demonstration retriever can be trained in, smallest to largest.

All have the vocabulary, the head size of the text tower and the width of the embeddings in common,
and text widths that groups of 128 weights divide (``micro``, for trying programs out, needs 64).
"""

import argparse
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

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


class NamedSize(NamedTuple):
    """A size, its name, and what it was asked for by: the name, or a file."""

    name: str
    size: Size
    given: str


SMALLEST_GROUP = 32
"""Of weights that share a scale, in the scale study."""
FIXED = ("vocab", "head_dim")
"""What the tokenizer and the rotary embedding have as they are."""
AROUND = ("rate", "batch", "warm_ups")
COUNTS = [item.name for item in fields(Shape) if item.name not in (*FIXED, "deepstack")]


def named_size(text: str) -> NamedSize:
    """Return one of `SIZES` by its name, or another from a JSON file; for argparse.

    The file has the keys of `Shape` except ``vocab`` and ``head_dim``, and ``rate``, ``batch`` and
    ``warm_ups`` of `Size`; what is left out is as in the demo model.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is neither, or no model of these sizes can be trained.
    """
    if text in SIZES:
        return NamedSize(text, SIZES[text], text)
    path = Path(text)
    if path.suffix != ".json":
        known = ", ".join(SIZES)
        raise argparse.ArgumentTypeError(f"{text}: give one of {known}, or a JSON file of sizes")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: is no JSON file ({error})") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{path}: is no JSON object of sizes")
    if problem := _problem(values):
        raise argparse.ArgumentTypeError(f"{path}: {problem}")
    around = {key: values.pop(key) for key in AROUND if key in values}
    if "warm_ups" in around:
        around["warm_ups"] = tuple(map(tuple, around["warm_ups"]))
    if "deepstack" in values:
        values["deepstack"] = tuple(values["deepstack"])
    shape = Shape(**values)
    if problem := _misfit(shape):
        raise argparse.ArgumentTypeError(f"{path}: {problem}")
    return NamedSize(path.stem, Size(shape, **around), text)


def _problem(values: dict[str, Any]) -> str | None:
    """Return what keys or types of a file are wrong."""
    for key, value in values.items():
        if key in COUNTS:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                return f"{key} is {value!r}; give a whole number from 1"
        elif key in ("rate", "batch"):
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                return f"{key} is {value!r}; give a number above 0"
        elif key == "deepstack":
            if not isinstance(value, list) or not all(type(item) is int for item in value):
                return f"deepstack is {value!r}; give a list of vision blocks"
        elif key == "warm_ups":
            try:
                good = all(0 <= at < 1 and 0 < length <= 1 for at, length in value)
            except (TypeError, ValueError):
                good = False
            if not good:
                return f"warm_ups is {value!r}; give pairs of fractions, [where, how long]"
        else:
            return f"{key} is none of {', '.join([*COUNTS, 'deepstack', *AROUND])}"
    return None


def _misfit(shape: Shape) -> str | None:
    """Return what sizes do not fit each other."""
    for one, other, factor in (
        ("heads", "kv_heads", 1),
        ("vision_hidden", "vision_heads", 4),  # rows and columns, each in two halves
    ):
        whole, part = getattr(shape, one), factor * getattr(shape, other)
        if whole % part:
            times = f"{factor} x " if factor > 1 else ""
            return f"{one} is {whole}, which {times}{other} = {part} does not divide"
    for name in ("hidden", "intermediate"):
        if getattr(shape, name) % SMALLEST_GROUP:
            return f"{name} is {getattr(shape, name)}; give a multiple of {SMALLEST_GROUP}"
    blocks = shape.deepstack
    if list(blocks) != sorted(set(blocks)) or not all(
        0 <= at < shape.vision_depth for at in blocks
    ):
        return f"deepstack is {list(blocks)}; give rising numbers from 0 to vision_depth - 1"
    if len(blocks) > shape.layers:
        return f"deepstack has {len(blocks)} blocks for {shape.layers} layers"
    return None


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
