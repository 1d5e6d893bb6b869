"""Pages of A4 at 150 dpi to measure the embedding of collections on; imports nothing heavy."""

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAGE = (1240, 1754)  # A4 at 150 dpi: 1260 visual tokens
PDF_PAGES = 32
TEXT = (
    "the annual report states that revenue of the northern branch rose while costs of paper and "
    "heating fell below the plan agreed with members in spring for pumps filters and valves"
)
WORDS = TEXT.split()


def draw(seed: int) -> Image.Image:
    """Return a page of text with a table and a picture, in colour."""
    rng = random.Random(seed)
    page = Image.new("RGB", PAGE, "white")
    pen = ImageDraw.Draw(page)
    title, body = (ImageFont.load_default(size) for size in (44, 23))
    pen.text((100, 90), f"Report {seed}: {' '.join(rng.sample(WORDS, 3))}", "navy", title)
    for line in range(36):
        text = " ".join(rng.choices(WORDS, k=13))
        pen.text((100, 180 + 31 * line), text, "black", body)
    for row in range(8):
        for column in range(4):
            box = (100 + 260 * column, 1320 + 36 * row)
            pen.rectangle((*box, box[0] + 260, box[1] + 36), outline="grey")
            pen.text((box[0] + 8, box[1] + 4), str(rng.randrange(10**6)), "black", body)
    picture = Image.effect_mandelbrot((300, 100), (-2 + rng.random(), -1.2, 1, 1.2), 40)
    page.paste(picture, (800, 1630))
    return page


def scan() -> Image.Image:
    """Return a page with colour and noise in every pixel, as scanned photographs have."""
    hues = (Image.linear_gradient("L").rotate(turn).resize(PAGE) for turn in (0, 90, 180))
    return Image.merge("RGB", [Image.blend(hue, Image.effect_noise(PAGE, 8), 0.5) for hue in hues])


def write_png(folder: Path, seed: int) -> None:
    """Write one page as a PNG file."""
    draw(seed).save(folder / f"page-{seed:06d}.png")


def write_pdf(folder: Path, first: int, count: int) -> None:
    """Write pages as one PDF of scans."""
    pages = [draw(seed) for seed in range(first, first + count)]
    path = folder / f"scan-{first:06d}.pdf"
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=150)
