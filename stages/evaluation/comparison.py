"""Original and quantized embeddings of one dataset, compared in every way that is reported.

Figures are rounded to 8 decimal places, so that the last bits of a machine's arithmetic stay out
of diffs.
"""

from typing import Any

from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings
from colqwen3.system.errors import UserError
from stages.evaluation.cosine import compare_tokens, flattened_cosine, grade
from stages.evaluation.retrieval import Run, best_relevant, compare, finite_scores

DECIMALS = 8
FIX = "run `dvc repro` to embed both again"


def evaluate(
    dataset: Dataset, original: Embeddings, quantized: Embeddings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare embeddings; return the metrics (all but the size) and the points of the plot.

    ``retrieval`` has each model search its own pages; ``mixed_index`` has the quantized queries
    search the original's pages, the index that a user already has. A point is the score of a
    query's best relevant page. Tokens with NaN or Inf are left out of the cosines, and become
    zero vectors in scores, which leave them out, so that every figure is finite; ``nonfinite``
    counts the NaN and Inf values.
    """
    before, after = _run(dataset, original, original), _run(dataset, quantized, quantized)
    flattened = round_floats(flattened_cosine(original.queries, quantized.queries))
    metrics = {
        "data": {"queries": len(dataset.queries), "pages": len(dataset.pages)},
        "queries": {
            **compare_tokens(original.queries, quantized.queries),
            "flattened_cosine": flattened,
            "grade": grade(flattened),
        },
        "pages": compare_tokens(original.pages, quantized.pages),
        "retrieval": compare(before, after, dataset.relevance),
        "mixed_index": compare(before, _run(dataset, quantized, original), dataset.relevance),
    }
    scores = zip(
        dataset.queries,
        best_relevant(before, dataset.relevance).tolist(),
        best_relevant(after, dataset.relevance).tolist(),
        strict=True,
    )
    points = [{"query": query, "original": a, "quantized": b} for query, a, b in scores]
    return metrics, points


def _run(dataset: Dataset, queries: Embeddings, pages: Embeddings) -> Run:
    names, stems = tuple(dataset.queries), tuple(dataset.pages)
    scores = finite_scores(
        [queries.queries[name] for name in names], [pages.pages[stem] for stem in stems]
    )
    return Run(names, stems, scores)


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
    for kind, wanted, before, after in kinds:
        for which, items in (("original", before), ("quantized", after)):
            for name in sorted(set(wanted) ^ set(items)):
                problem = "lack" if name in wanted else "hold an unknown"
                raise UserError(f"{which} embeddings {problem} {kind} {name!r}; {FIX}")
        for name in wanted:
            if before[name].shape != after[name].shape:
                raise UserError(
                    f"{kind} {name!r} is {list(before[name].shape)} in the original embeddings, "
                    f"{list(after[name].shape)} in the quantized; {FIX}"
                )


def round_floats(value: Any) -> Any:
    """Return a JSON value with every float rounded to 8 decimal places."""
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    return round(value, DECIMALS) if isinstance(value, float) else value
