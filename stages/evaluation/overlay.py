"""Drawing of pages under their maps, side by side, as one small PNG; Pillow only."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

MARGIN, BAR, MIN_WIDTH = 16, 12, 640
LONGEST = 600  # characters of a title; fewer fit
# from white, which leaves the page as it is, to red; darker is a better match
COLOURS = ((255, 255, 255), (255, 237, 160), (254, 178, 76), (252, 98, 42), (214, 24, 32))
DARKEST = 48  # grey that black is shown as
STEPS = 16  # of the colours, times 16 greys: the 256 entries of a PNG palette

Map = NDArray[np.float64]


@dataclass(frozen=True)
class Size:
    """How large a picture may be: the first height of a page that fits the bytes is taken."""

    heights: tuple[int, ...]
    bytes: int


FULL = Size((640, 560, 480, 400, 320, 240), 150_000)
"""A picture that Git tracks."""
SMALL = Size((400, 320, 240), 80_000)
"""One of several pictures in a report."""


def colour(values: Map, low: float, high: float) -> Image.Image:
    """Return one pixel a value, by the scale from `low` (or less) to `high` in STEPS colours."""
    position = (values - low) / (high - low) if high > low else np.zeros_like(values)
    step = np.clip(np.floor(position * STEPS), 0, STEPS - 1).astype(int)
    return Image.fromarray(_colours()[step])


def _colours() -> NDArray[np.uint8]:
    """Return the STEPS colours of the scale [STEPS, 3]."""
    here, stops = np.linspace(0, 1, STEPS), np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(here, stops, channel) for channel in zip(*COLOURS, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def overlay(page: Image.Image, values: Map, low: float, high: float, height: int) -> Image.Image:
    """Return the page in grey with its cells coloured, shrunk or enlarged to fit.

    Multiplying keeps print darker than its cell, whatever the colour. That needs a light page: a
    dark one is shown as its negative, and black is lifted a little.
    """
    rows, columns = values.shape
    scale = min(height / rows, 0.8 * height / columns)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    grey = page.convert("RGB").convert("L").resize(size, Image.Resampling.LANCZOS)
    if np.asarray(grey).mean() < 128:
        grey = ImageOps.invert(grey)
    lifted = grey.point([round(DARKEST + level * (255 - DARKEST) / 255) for level in range(256)])
    cells = colour(values, low, high).resize(size, Image.Resampling.NEAREST)
    return ImageChops.multiply(lifted.convert("RGB"), cells)


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
    palette.putpalette((_colours()[:, None] * greys).round().astype(np.uint8).tobytes())
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
