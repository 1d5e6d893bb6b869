"""Cosines of a quantized model's tokens with the original's."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stages.evaluation.retrieval import Floats

GRADES = ((0.95, "EXCELLENT"), (0.90, "GOOD"), (0.85, "FAIR"))

Items = Mapping[str, torch.Tensor]


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
