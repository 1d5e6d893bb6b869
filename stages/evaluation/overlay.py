"""Drawing of pages under their maps, side by side, as one small PNG; Pillow only."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from colqwen3.search.maps import STEPS, Map, colour, overlay, scale_colours

MARGIN, BAR, MIN_WIDTH = 16, 12, 640
LONGEST = 600  # characters of a title; fewer fit


@dataclass(frozen=True)
class Size:
    """How large a picture may be: the first height of a page that fits the bytes is taken."""

    heights: tuple[int, ...]
    bytes: int


FULL = Size((640, 560, 480, 400, 320, 240), 150_000)
"""A picture that Git tracks."""
SMALL = Size((400, 320, 240), 80_000)
"""One of several pictures in a report."""


def draw(
    pages: Sequence[Image.Image],
    maps: Sequence[Map],
    captions: Sequence[str],
    title: str,
    height: int,
) -> Image.Image:
    """Return two pages under their maps side by side, under a title and over their colour scale."""
    values = np.concatenate([map.ravel() for map in maps])
    low, high = float(np.median(values)), float(values.max())
    panels = [overlay(page, map, low, high, height) for page, map in zip(pages, maps, strict=True)]
    wide, tall = (max(sides) for sides in zip(*(panel.size for panel in panels), strict=True))
    width = max(MIN_WIDTH, 2 * wide + 3 * MARGIN)
    large, small = ImageFont.load_default(17), ImageFont.load_default(14)
    lines = wrap(title, large, width - 2 * MARGIN)
    top = MARGIN + 24 * len(lines)
    image = Image.new("RGB", (width, top + 24 + tall + 2 * MARGIN + BAR + 26), "white")
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN // 2 + 24 * number), line, "black", large)
    step = (width - MARGIN) // 2
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = MARGIN + number * step
        pen.text((left, top), caption, "black", small)
        image.paste(panel, (left, top + 24))
        right, lower = left + panel.width, top + 24 + panel.height
        pen.rectangle((left - 1, top + 23, right, lower), outline="#999999")
    bar = colour(np.linspace(low, high, width - 2 * MARGIN)[None], low, high)
    bottom = top + 24 + tall + MARGIN
    image.paste(bar.resize((bar.width, BAR)), (MARGIN, bottom))
    pen.rectangle((MARGIN - 1, bottom - 1, width - MARGIN, bottom + BAR), outline="#999999")
    under = bottom + BAR + 6
    pen.text((MARGIN, under), f"{low:.3f}", "black", small)
    pen.text((width - MARGIN, under), f"{high:.3f}", "black", small, anchor="ra")
    pen.text(
        (width // 2, under), "mean cosine of the query's tokens with each cell; white: median or below",
        "black", small, anchor="ma",
    )  # fmt: skip
    return image


def wrap(text: str, font: Any, width: int, limit: int = 2) -> list[str]:
    """Break text into at most so many lines of `width` pixels; what is left out shows as dots."""
    lines = [""]
    for word in text[:LONGEST].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = len(lines) > limit
    lines = lines[:limit]
    for number, line in enumerate(lines):
        dots = " ..." if cut and number == limit - 1 else ""
        if font.getlength(line + dots) > width:
            dots = " ..."
        while line and font.getlength(line + dots) > width:
            line = line[:-1]
        lines[number] = line + dots
    return lines


def encode(image: Image.Image) -> bytes:
    """Return the picture as PNG, each colour of the scale in 16 greys; equal in, equal out."""
    greys = np.linspace(0, 1, 256 // STEPS)[None, :, None]
    palette = Image.new("P", (1, 1))
    palette.putpalette((scale_colours()[:, None] * greys).round().astype(np.uint8).tobytes())
    file = io.BytesIO()
    few = image.quantize(palette=palette, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True)
    return file.getvalue()


def picture(
    pages: Sequence[Image.Image],
    maps: Sequence[Map],
    captions: Sequence[str],
    title: str,
    size: Size = FULL,
) -> bytes:
    """Return two pages under their maps as a PNG, as high as the bytes of `size` allow.

    Parameters
    ----------
    pages
        The left and the right one; they may be the same.
    maps
        What colours each, [rows, columns]; both share one scale, from the median to the best.
    captions
        A line above each page.
    title
        At most two lines above both.
    size
        Bounds of the picture.
    """
    png = b""
    for height in size.heights:
        png = encode(draw(pages, maps, captions, title, height))
        if len(png) <= size.bytes:
            break
    return png
