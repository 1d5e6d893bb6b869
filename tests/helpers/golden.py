"""Pages of the golden set as the publisher's code sees them.

On transformers 4.57 that code drops the alpha channel of a page; ours shows it on white paper. So
golden embeddings are those of opaque pages.
"""

from pathlib import Path

from PIL import Image

PAGES = Path("tests/golden/inputs/pages")
STEMS = sorted(path.stem for path in PAGES.glob("*.png"))


def golden_page(stem: str) -> Image.Image:
    """Return a golden page in RGB, its alpha dropped."""
    with Image.open(PAGES / f"{stem}.png") as image:
        return image.convert("RGB")


def write_golden_pages(folder: Path) -> Path:
    """Write all golden pages, opaque, into a new folder."""
    folder.mkdir()
    for stem in STEMS:
        golden_page(stem).save(folder / f"{stem}.png")
    return folder
