"""Draw the five test pages of the golden set.

Only plain shapes and Pillow's built-in bitmap font are used: neither depends on FreeType or on
installed fonts, so the pages come out the same on every machine. The sizes and image modes are
chosen to exercise the image pre-processing, see `PAGES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

_WORDS = [
    "revenue",
    "margin",
    "page",
    "table",
    "axis",
    "total",
    "quarter",
    "figure",
    "budget",
    "region",
    "energy",
    "cost",
    "growth",
    "index",
    "share",
    "report",
    "annual",
    "net",
    "value",
    "forecast",
    "import",
    "export",
    "rate",
    "unit",
]


def _text_line(words: int, scale: int, rng: random.Random) -> Image.Image:
    """Return one line of random words as a grey mask, enlarged by a whole factor."""
    text = " ".join(f"{rng.choice(_WORDS)} {rng.randrange(1000)}" for _ in range(words))
    font = ImageFont.load_default_imagefont()
    box = font.getbbox(text)
    mask = Image.new("L", (int(box[2]), int(box[3])), 0)
    ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font)
    # Nearest-neighbour enlargement keeps the PNG small: the page has few distinct runs.
    return mask.resize((mask.width * scale, mask.height * scale), Image.Resampling.NEAREST)


def _stamp(rng: random.Random) -> Image.Image:
    """Return a small RGBA image whose alpha varies, so that flattening it would show."""
    image = Image.new("RGBA", (61, 43))
    image.putdata(
        [(4 * x, 255 - 5 * y, (x * y) % 256, (3 * x + 2 * y) % 256)
         for y in range(43) for x in range(61)]
    )  # fmt: skip
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(50), rng.randrange(34)
        draw.rectangle((x, y, x + 9, y + 6), fill=(rng.randrange(256), 30, 200, rng.randrange(256)))
    return image


def _chart(rng: random.Random) -> Image.Image:
    """Return a grey bar chart whose height lies halfway between two multiples of 32."""
    image = Image.new("L", (300, 400), 245)
    draw = ImageDraw.Draw(image)
    for bar in range(9):
        top = rng.randrange(60, 360)
        draw.rectangle((20 + 30 * bar, top, 40 + 30 * bar, 380), fill=rng.randrange(20, 200))
    draw.line((12, 380, 292, 380), fill=0, width=3)
    image.paste(10, (14, 16), _text_line(3, 2, rng))
    return image


def _banner(rng: random.Random) -> Image.Image:
    """Return a wide palette image."""
    image = Image.new("RGB", (1600, 96), (250, 240, 210))
    draw = ImageDraw.Draw(image)
    for step in range(16):
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        draw.rectangle((100 * step, 60, 100 * step + rng.randrange(20, 95), 90), fill=colour)
    image.paste((20, 20, 90), (20, 8), _text_line(12, 2, rng))
    return image.quantize(colors=32)


def _text_page(rng: random.Random) -> Image.Image:
    """Return a colour page of text lines and a small diagram."""
    image = Image.new("RGB", (850, 1100), "white")
    image.paste((120, 0, 20), (60, 40), _text_line(3, 4, rng))
    for line in range(30):
        image.paste((0, 0, 0), (60, 120 + 22 * line), _text_line(rng.randrange(3, 7), 2, rng))
    draw = ImageDraw.Draw(image)
    for cell in range(12):
        x, y = 60 + 120 * (cell % 6), 820 + 110 * (cell // 6)
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        draw.ellipse((x, y, x + 100, y + 90), fill=colour, outline="black", width=3)
    return image


def _plan(rng: random.Random) -> Image.Image:
    """Return a large bilevel page of plain shapes."""
    image = Image.new("1", (1700, 2200), 1)
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = rng.randrange(1500), rng.randrange(2000)
        box = (x, y, x + rng.randrange(40, 400), y + rng.randrange(20, 300))
        draw.rectangle(box, fill=rng.randrange(2), outline=0, width=5)
    image.paste(0, (100, 60), _text_line(4, 6, rng).convert("1"))
    return image


#: File stem and drawing function of each page.
#: - stamp: far below the smallest allowed area, so both sides grow; RGBA, whose colours count as if
#:   they were opaque.
#: - chart: grey; 400 / 32 = 12.5 shows how halves are rounded.
#: - banner: palette mode, a grid of 3 rows.
#: - report: one side grows while the other shrinks; the grid is larger than every M-RoPE section.
#: - plan: bilevel, over the cap on visual tokens.
PAGES: dict[str, Callable[[random.Random], Image.Image]] = {
    "stamp_61x43_rgba": _stamp,
    "chart_300x400_grey": _chart,
    "banner_1600x96_palette": _banner,
    "report_850x1100_rgb": _text_page,
    "plan_1700x2200_bilevel": _plan,
}


def draw_page(stem: str, seed: int) -> Image.Image:
    """Draw one page of `PAGES`; the same seed always gives the same pixels."""
    return PAGES[stem](random.Random(f"{seed}/{stem}"))
