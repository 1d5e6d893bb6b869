"""Rank real manual pages: ``python -m demo.training.real_pages --model DIR manual.pdf ...``.

The queries are the titles of each PDF's outline, the right answer the page a title points to.
Nothing is fetched; the PDF files are the caller's.  Needs the optional package pypdfium2.
"""

import argparse
import json
import random
import re
from pathlib import Path

import pypdfium2
import torch
from PIL import Image

from demo.training.embed import embed_page, embed_query, load, score
from demo.training.score import ndcg

POINTS = 72


def outline_pages(
    path: Path, count: int, dpi: int, seed: int
) -> tuple[list[Image.Image], list[tuple[str, int]]]:
    """Return some pages of a PDF and the titles that lead to them.

    Parameters
    ----------
    path : Path
        A PDF file with an outline.
    count : int
        Pages at most.
    dpi : int
        Resolution in pixels an inch.
    seed : int
        Seed of the choice of pages.

    Returns
    -------
    tuple
        The rendered pages, and (title, position of its page among them).  Only titles that point
        to one page alone are asked, one a page.
    """
    document = pypdfium2.PdfDocument(path)
    titles: dict[str, set[int]] = {}
    for entry in document.get_toc():
        target = entry.get_dest()
        number = target.get_index() if target else None
        title = re.sub(r"^[\dA-Z.]+\s+", "", entry.get_title().strip())
        if number is not None and len(title) > 3:
            titles.setdefault(title, set()).add(number)
    single = [(title, next(iter(where))) for title, where in titles.items() if len(where) == 1]
    by_page: dict[int, list[str]] = {}
    for title, number in single:
        by_page.setdefault(number, []).append(title)
    rng = random.Random(seed)
    chosen = sorted(rng.sample(sorted(by_page), min(count, len(by_page))))
    pages = [document[number].render(scale=dpi / POINTS).to_pil() for number in chosen]
    return pages, [(rng.choice(by_page[number]), place) for place, number in enumerate(chosen)]


def main() -> None:
    """Print nDCG@5 and the level of chance for each PDF."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("pdf", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--pages", type=int, default=60, help="pages of each PDF at most")
    parser.add_argument("--dpi", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    for path in options.pdf:
        pages, asked = outline_pages(path, options.pages, options.dpi, options.seed)
        relevant = torch.zeros(len(asked), len(pages), dtype=torch.bool)
        for row, (_, place) in enumerate(asked):
            relevant[row, place] = True
        scores = score(
            [embed_page(model, page) for page in pages],
            [embed_query(model, tokenizer, title) for title, _ in asked],
        )
        result = {"document": path.stem, "pages": len(pages), "dpi": options.dpi}
        print(json.dumps({**result, **ndcg(scores, relevant)}))


if __name__ == "__main__":
    main()
