"""Original and quantized embeddings of one dataset, compared in every way that is reported.

Pages are read a batch at a time, from a file where the embeddings lie in one: memory grows with
the scores alone.

Figures are rounded so far that the last bits of a machine's arithmetic stay out of diffs: plain
rounding gave the same cosines to 6 decimal places, the same other figures to 5 and the same scores
to 3 on two kinds of CPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from colqwen3.checkpoint.tensor_file import StoredTensors
from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings
from colqwen3.model.scoring import BATCH
from colqwen3.system.errors import UserError
from stages.evaluation.cosine import TokenCosines, compare_tokens, flattened_cosine, grade
from stages.evaluation.retrieval import Run, best_relevant, compare, finite, first_pages, search

COSINE_DECIMALS, DECIMALS, SCORE_DECIMALS = 6, 5, 3
COSINES = ("cosine", "flattened_cosine")
"""Keys under which figures are cosines."""
FIX = "run `dvc repro` to embed both again"

Items = Mapping[str, torch.Tensor]


class Comparison(NamedTuple):
    """What `evaluate` returns.

    Attributes
    ----------
    metrics
        All figures but sizes, not rounded.
    points
        Score of each query's best relevant page: ``query``, ``original``, ``quantized``.
    results
        First page and rank of the best relevant page of each query, see `first_pages`: ``query``,
        ``original``, ``quantized``.
    """

    metrics: dict[str, Any]
    points: list[dict[str, Any]]
    results: list[dict[str, Any]]


def evaluate(dataset: Dataset, original: Embeddings, quantized: Embeddings) -> Comparison:
    """Compare embeddings of a dataset, which `check_items` has passed.

    ``retrieval`` has each model search its own pages; ``mixed_index`` has the quantized queries
    search the original's pages, the index that a user already has. Tokens with NaN or Inf are left
    out of the cosines, and become zero vectors in scores, which leave them out, so that every
    figure is finite; ``nonfinite`` counts the NaN and Inf values.
    """
    names = tuple(dataset.queries)
    before_queries = {name: original.queries[name] for name in names}
    after_queries = {name: quantized.queries[name] for name in names}
    pages, (before, after, mixed) = _compare_pages(
        dataset, (before_queries, after_queries), (original.pages, quantized.pages)
    )
    flattened = flattened_cosine(before_queries, after_queries)
    metrics = {
        "data": {"queries": len(dataset.queries), "pages": len(dataset.pages)},
        "queries": {
            **compare_tokens(before_queries, after_queries),
            "flattened_cosine": flattened,
            "grade": grade(round(flattened, COSINE_DECIMALS)),
        },
        "pages": pages,
        "retrieval": compare(before, after, dataset.relevance),
        "mixed_index": compare(before, mixed, dataset.relevance),
    }
    points, results = (
        [
            {"query": query, "original": one, "quantized": other}
            for query, one, other in zip(names, *pair, strict=True)
        ]
        for pair in (
            [best_relevant(run, dataset.relevance).tolist() for run in (before, after)],
            [first_pages(run, dataset.relevance) for run in (before, after)],
        )
    )
    return Comparison(metrics, points, results)


def _compare_pages(
    dataset: Dataset, queries: tuple[Items, Items], pages: tuple[Items, Items]
) -> tuple[dict[str, Any], list[Run]]:
    """Read each page once; return the figures of page tokens, and the scores.

    Returns
    -------
    dict, list of Run
        The runs are the original's, the quantized model's, and that of quantized queries on the
        original's pages.
    """
    names, stems = tuple(dataset.queries), tuple(dataset.pages)
    searches = ((0, 0), (1, 1), (1, 0))  # whose queries on whose pages
    runs = [
        Run(names, stems, np.empty((len(names), len(stems)), dtype=np.float32)) for _ in searches
    ]
    cosines = TokenCosines(sum(shape[0] for shape in _shapes(pages[0]).values()))
    query_tokens = [[finite(side[name]) for name in names] for side in queries]
    for start in range(0, len(stems), BATCH):
        batch = stems[start : start + BATCH]
        both = [[side[stem] for stem in batch] for side in pages]
        for original, quantized in zip(*both, strict=True):
            cosines.add(original, quantized)
        page_tokens = [[finite(tokens) for tokens in side] for side in both]
        for run, (query_side, page_side) in zip(runs, searches, strict=True):
            scores = search(query_tokens[query_side], page_tokens[page_side])
            run.scores[:, start : start + BATCH] = scores
    return cosines.figures(), runs


def _shapes(items: Items) -> dict[str, tuple[int, ...]]:
    if isinstance(items, StoredTensors):
        return items.shapes
    return {name: tuple(tokens.shape) for name, tokens in items.items()}


def check_items(dataset: Dataset, original: Embeddings, quantized: Embeddings) -> None:
    """Check that both hold the dataset's items, with the same tokens each.

    Raises
    ------
    UserError
        If an item is missing or unknown, or has another shape.
    """
    kinds = (
        ("query", dataset.queries, original.queries, quantized.queries),
        ("page", dataset.pages, original.pages, quantized.pages),
    )
    for kind, expected, before, after in kinds:
        shapes = {"original": _shapes(before), "quantized": _shapes(after)}
        for which, items in shapes.items():
            for name in sorted(set(expected) ^ set(items)):
                problem = "lack" if name in expected else "hold an unknown"
                raise UserError(f"{which} embeddings {problem} {kind} {name!r}; {FIX}")
        for name in expected:
            one, other = (items[name] for items in shapes.values())
            if one != other:
                raise UserError(
                    f"{kind} {name!r} is {list(one)} in the original embeddings, "
                    f"{list(other)} in the quantized; {FIX}"
                )


def round_figures(value: Any, decimals: int = DECIMALS) -> Any:
    """Return metrics with every float rounded: cosines to 6 decimal places, others to 5."""
    if isinstance(value, dict):
        return {
            key: round_figures(item, COSINE_DECIMALS if key in COSINES else decimals)
            for key, item in value.items()
        }
    return round(value, decimals) if isinstance(value, float) else value


def round_points(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of the plot with their scores rounded to 3 decimal places."""
    return [
        {
            key: round(value, SCORE_DECIMALS) if isinstance(value, float) else value
            for key, value in point.items()
        }
        for point in points
    ]
