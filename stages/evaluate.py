"""Stage `evaluate@<recipe>`: what quantization did to embeddings, to search, and to size.

`python -m stages.evaluate RECIPE` compares the stored embeddings of the original and of a recipe,
and writes ``metrics/<recipe>.json`` and the points of a scatter plot. Figures are rounded to
8 decimal places, so that the last bits of a machine's arithmetic stay out of diffs.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.dataset import Dataset, read_dataset
from stages.embeddings import Embeddings, read_embeddings
from stages.errors import PipelineError, run
from stages.files import read_json, write_json
from stages.lock import claim
from stages.params import load_params
from stages.paths import EMBEDDINGS, METRICS, PLOTS, QUANTIZE_METRICS
from stages.retrieval import Floats, Run, best_relevant, compare, finite_scores
from stages.summary import SUMMARIES, summarize

COMPONENTS = ("language_model", "projection", "token_embeddings", "vision")
PARTS = ("files", *COMPONENTS)
MODEL_KEYS = {"files": "files_bytes"} | {name: f"components.{name}.bytes" for name in COMPONENTS}
QUANTIZE_KEYS = {"files": "bytes.files"} | {name: f"bytes.components.{name}" for name in COMPONENTS}
GRADES = ((0.95, "EXCELLENT"), (0.90, "GOOD"), (0.85, "FAIR"))
DECIMALS = 8
MEND = "run `dvc repro` to embed both again"

Items = Mapping[str, torch.Tensor]


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


def compare_tokens(original: Items, quantized: Items) -> dict[str, Any]:
    """Return mean, 1st percentile and minimum of the tokens' cosines, and the NaN and Inf values.

    All tokens of all items count alike. The percentile interpolates linearly between order
    statistics (numpy's default). With no finite token the three figures are 0.
    """
    cosines = token_cosines(original, quantized)
    if len(cosines) == 0:
        cosines = np.zeros(1)
    return {
        "cosine": {
            "mean": float(cosines.mean()),
            "p01": float(np.percentile(cosines, 1)),
            "min": float(cosines.min()),
        },
        "nonfinite": _count_nonfinite(quantized),
        "nonfinite_original": _count_nonfinite(original),
    }


def token_cosines(original: Items, quantized: Items) -> Floats:
    """Return the cosine of each token with the original's, where both are finite; 0 of a zero."""
    pairs = [_finite_pair(tokens, quantized[name]) for name, tokens in original.items()]
    return np.concatenate([_cosine(a, b).numpy() for a, b in pairs])


def flattened_cosine(original: Items, quantized: Items) -> float:
    """Return the cosine of the items' embeddings, each flattened to one vector; mean of items."""
    pairs = [_finite_pair(tokens, quantized[name]) for name, tokens in original.items()]
    return float(np.mean([float(_cosine(a.flatten(), b.flatten())) for a, b in pairs]))


def _finite_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, in float64, the tokens that are finite in both."""
    kept = a.isfinite().all(-1) & b.isfinite().all(-1)
    return a[kept].double(), b[kept].double()


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, 0)


def _count_nonfinite(items: Items) -> int:
    return sum(int((~tokens.isfinite()).sum()) for tokens in items.values())


def grade(cosine: float) -> str:
    """Return the grade of a flattened cosine: EXCELLENT, GOOD, FAIR or POOR."""
    return next((name for limit, name in GRADES if cosine >= limit), "POOR")


def check_items(dataset: Dataset, original: Embeddings, quantized: Embeddings) -> None:
    """Check that both hold the dataset's items, with the same tokens each.

    Raises
    ------
    PipelineError
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
                raise PipelineError(f"{which} embeddings {problem} {kind} {name!r}; {MEND}")
        for name in wanted:
            if before[name].shape != after[name].shape:
                raise PipelineError(
                    f"{kind} {name!r} is {list(before[name].shape)} in the original embeddings, "
                    f"{list(after[name].shape)} in the quantized; {MEND}"
                )


def compare_sizes(original: Mapping[str, int], quantized: Mapping[str, int]) -> dict[str, Any]:
    """Return bytes of both by part, original / quantized as ``ratio``, and the reduction in %."""
    return {
        part: {
            "original": original[part],
            "quantized": quantized[part],
            "ratio": original[part] / quantized[part],
            "reduction_percent": 100 * (1 - quantized[part] / original[part]),
        }
        for part in PARTS
    }


def read_bytes(path: Path, keys: Mapping[str, str], mend: str) -> dict[str, int]:
    """Return the bytes of each part from a metrics file, found by its dotted key.

    Raises
    ------
    PipelineError
        If the file is missing, or lacks a figure.
    """
    metrics = read_json(path, mend)
    sizes = {}
    for part in PARTS:
        value = metrics
        for key in keys[part].split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, int) or value <= 0:
            raise PipelineError(f"{path}: {keys[part]} is {value!r}, no number of bytes; {mend}")
        sizes[part] = value
    return sizes


def round_floats(value: Any) -> Any:
    """Return a JSON value with every float rounded to 8 decimal places."""
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def main() -> None:
    """Write the metrics and the plot of one recipe."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluate", description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a key of recipes in params.yaml")
    recipe = parser.parse_args().recipe
    params = load_params()
    params.recipe(recipe)
    claim(f"evaluate@{recipe}")
    dataset = read_dataset(Path(params.evaluate.dataset))
    original = read_embeddings(EMBEDDINGS / "original.safetensors")
    quantized = read_embeddings(EMBEDDINGS / f"{recipe}.safetensors")
    check_items(dataset, original, quantized)
    metrics, points = evaluate(dataset, original, quantized)
    metrics["size"] = compare_sizes(
        read_bytes(METRICS / "model.json", MODEL_KEYS, "run `dvc repro inspect`"),
        read_bytes(
            QUANTIZE_METRICS / f"{recipe}.json",
            QUANTIZE_KEYS,
            f"run `dvc repro quantize@{recipe}`",
        ),
    )
    write_json(PLOTS / recipe / "scores.json", round_floats(points))
    write_json(METRICS / f"{recipe}.json", round_floats(metrics))
    write_json(SUMMARIES / f"{recipe}.json", summarize(metrics))


if __name__ == "__main__":
    run(main)
