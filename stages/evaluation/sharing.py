"""What the evaluation set shares with the set that a recipe is tuned on."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from colqwen3.dataset.beir import Dataset, read_queries
from colqwen3.dataset.pages import Page, find_pages
from colqwen3.system.files import digest_file, path_is

NOTHING_SHARED: dict[str, Any] = {"same_folder": False, "pages": 0, "queries": 0}


def find_shared(evaluation: Dataset, folder: Path, calibration: Path) -> dict[str, Any]:
    """Return how many evaluation pages and queries the calibration dataset holds too.

    Pages are the same if their files hold the same bytes; queries, if their texts do after Unicode
    compatibility normalisation, without case and repeated white space.

    Parameters
    ----------
    evaluation
        The dataset that quality is measured on.
    folder, calibration
        Folder of that dataset, and of the one that is tuned on.

    Returns
    -------
    dict
        ``same_folder``, and the numbers of shared ``pages`` and ``queries``.

    Raises
    ------
    UserError
        If pages or queries of the calibration dataset cannot be read.
    """
    corpus = calibration / "corpus"
    pages = find_pages(corpus) if path_is(corpus, Path.is_dir) else {}
    texts: list[str] = []
    for name in ("queries.jsonl", "texts.jsonl"):
        if path_is(calibration / name, Path.is_file):
            texts += read_queries(calibration / name).values()
    known = {normalise(text) for text in texts}
    return {
        "same_folder": folder.resolve() == calibration.resolve(),
        "pages": _count_shared_pages(evaluation.pages.values(), pages.values()),
        "queries": sum(normalise(text) in known for text in evaluation.queries.values()),
    }


def normalise(text: str) -> str:
    """Return a text without what does not make it another query."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _count_shared_pages(pages: Iterable[Page], others: Iterable[Page]) -> int:
    """Count the pages whose bytes are among the others; only files of one size are read."""
    by_size: dict[int, set[Path]] = defaultdict(set)
    for other in others:
        by_size[other.path.stat().st_size].add(other.path)
    digest = cache(digest_file)
    count = 0
    for page in pages:
        candidates = by_size.get(page.path.stat().st_size, set())
        count += digest(page.path) in map(digest, candidates) if candidates else 0
    return count
