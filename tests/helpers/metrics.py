"""Metrics of a recipe made by hand, whole and consistent, as `evaluate` would write them."""

import json
from pathlib import Path
from typing import Any

from stages.evaluation.limits import GateParams


def contrast(original: float, quantized: float, low: float, high: float) -> dict[str, float]:
    """One figure of both models, with its 95 % interval."""
    difference = round(quantized - original, 5)
    return {
        "original": original, "quantized": quantized, "difference": difference,
        "low": low, "high": high, "smallest_visible_loss": round(difference - low, 5),
    }  # fmt: skip


def quality(
    query: Any = 0.9734,
    page: Any = 0.9812,
    ndcg: dict[str, float] | None = None,
    queries: int = 252,
    nonfinite: tuple[int, int] = (0, 0),
    **changes: Any,
) -> dict[str, Any]:
    """Return metrics/quality/<recipe>.json; `changes` replace top-level keys."""
    retrieval = {
        "ndcg_at_5": ndcg or contrast(0.9111, 0.8222, -0.1333, 0.0444),
        "ndcg_at_10": contrast(0.9211, 0.8522, -0.1233, 0.0333),
        "recall_at_1": contrast(0.7011, 0.6022, -0.2, 0.1),
        "recall_at_5": contrast(0.95, 0.95, -0.01, 0.01),
        "margin": contrast(1.5, 1.25, -0.3055, 0.2066),
        "first_pages": {
            "changed": 66, "changed_share": 0.2619, "changed_share_at_most": 0.3113,
            "ranked_lower": 41, "ranked_higher": 17,
        },
        "top1_agreement": 0.7381,
        "top5_overlap": 0.8, "spearman": 0.91, "pearson": 0.92,
    }  # fmt: skip
    return {
        "data": {"queries": queries, "pages": 126},
        "queries": {
            "cosine": {"mean": query, "p01": 0.9123, "min": 0.8},
            "flattened_cosine": 0.9645,
            "grade": "EXCELLENT",
            "nonfinite": nonfinite[0],
            "nonfinite_original": 0,
        },
        "pages": {
            "cosine": {"mean": page, "p01": 0.9234, "min": 0.8},
            "nonfinite": nonfinite[1],
            "nonfinite_original": 0,
        },
        "retrieval": retrieval,
        "mixed_index": {**retrieval, "ndcg_at_5": contrast(0.9111, 0.8567, -0.1, 0.1)},
        "size": {
            "files": {"original": 10_790_224, "quantized": 7_304_168, "ratio": 1.47727, "reduction_percent": 32.3}
        },
        "overlap": {"same_folder": False, "pages": 0, "queries": 0},
        "quantization": {"layers_worse_than_rounding": 0},
        **changes,
    }  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


WITHIN_THE_LIMITS: dict[str, Any] = {"ndcg": contrast(0.9111, 0.9002, -0.0222, 0.0044)}
"""Arguments of `quality` with which a recipe passes the gate of params.yaml."""

SMALL: dict[str, Any] = {
    "data": {"queries": 6},
    "overlap": {"same_folder": False, "pages": 0, "queries": 0},
    "pages": {
        "cosine": {"mean": 0.987654, "p01": 0.1, "min": 0.0},
        "nonfinite": 0,
        "nonfinite_original": 0,
    },
    "queries": {
        "cosine": {"mean": 0.9, "p01": 0.1, "min": 0.0},
        "grade": "GOOD",
        "nonfinite": 0,
        "nonfinite_original": 0,
    },
    "retrieval": {
        "ndcg_at_5": {"original": 0.75, "quantized": 0.5, "difference": -0.25},
        "recall_at_1": {"original": 0.6, "quantized": 0.4},
        "margin": {"original": 3.0, "quantized": 2.0},
        "top1_agreement": 0.33333,
        "first_pages": {
            "changed": 4,
            "changed_share": 0.66667,
            "ranked_lower": 3,
            "ranked_higher": 1,
        },
    },
    "mixed_index": {"ndcg_at_5": {"original": 0.75, "quantized": 0.625}},
    "size": {"files": {"original": 4_000_000, "quantized": 1_250_000}},
}


"""What a summary needs of the metrics, each figure another one."""

GATE = GateParams(
    min_query_cosine=None, min_page_cosine=None, max_ndcg_at_5_drop=0.05, max_bytes=None
)
