"""Cosines of a quantized model's tokens with the original's, one item in memory at a time."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

GRADES = ((0.95, "EXCELLENT"), (0.90, "GOOD"), (0.85, "FAIR"))
PENDING = 1 << 16
"""Cosines that wait before the lowest are picked out of them."""

Floats = NDArray[np.float64]
Items = Mapping[str, torch.Tensor]


class TokenCosines:
    """Mean, 1st percentile and minimum of the cosines of many tokens, without keeping them.

    All tokens of all items count alike. The percentile interpolates linearly between order
    statistics (numpy's default), so only the lowest hundredth of the cosines is needed.

    Parameters
    ----------
    tokens
        How many tokens will be added in all, those that are not finite included.
    """

    def __init__(self, tokens: int) -> None:
        self._needed = max(0, tokens - 1) // 100 + 2
        self._lowest: list[Floats] = []
        self._waiting = self._count = 0
        self._sum = 0.0
        self._nonfinite = self._nonfinite_original = 0

    def add(self, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Add the tokens of one item, both [tokens, embed_dim]."""
        cosines = token_cosines(original, quantized)
        self._sum += math.fsum(cosines)
        self._count += len(cosines)
        self._nonfinite += _count_nonfinite(quantized)
        self._nonfinite_original += _count_nonfinite(original)
        self._lowest.append(cosines)
        self._waiting += len(cosines)
        if self._waiting > self._needed + PENDING:
            self._drop()

    def _drop(self) -> None:
        """Keep only the cosines that may still count among the lowest."""
        cosines = np.concatenate([np.empty(0), *self._lowest])
        if len(cosines) > self._needed:
            cosines = np.partition(cosines, self._needed - 1)[: self._needed].copy()
        self._lowest, self._waiting = [cosines], 0

    def figures(self) -> dict[str, Any]:
        """Return the three figures and the NaN and Inf values; with no finite token they are 0."""
        self._drop()
        lowest = np.sort(self._lowest[0]) if self._count else np.zeros(1)
        place = 0.01 * max(0, self._count - 1)
        below = int(place)
        above = min(below + 1, len(lowest) - 1)
        p01 = lowest[below] + (place - below) * (lowest[above] - lowest[below])
        return {
            "cosine": {
                "mean": self._sum / max(1, self._count),
                "p01": float(p01),
                "min": float(lowest[0]),
            },
            "nonfinite": self._nonfinite,
            "nonfinite_original": self._nonfinite_original,
        }


def compare_tokens(original: Items, quantized: Items) -> dict[str, Any]:
    """Return the figures of `TokenCosines` over all items."""
    cosines = TokenCosines(sum(len(tokens) for tokens in original.values()))
    for name, tokens in original.items():
        cosines.add(tokens, quantized[name])
    return cosines.figures()


def token_cosines(original: torch.Tensor, quantized: torch.Tensor) -> Floats:
    """Return the cosine of each token with the original's, where both are finite; 0 of a zero."""
    cosines: Floats = _cosine(*_finite_pair(original, quantized)).numpy()
    return cosines


def flattened_cosine(original: Items, quantized: Items) -> float:
    """Return the cosine of the items' embeddings, each flattened to one vector; mean of items."""
    cosines = []
    for name, tokens in original.items():
        before, after = _finite_pair(tokens, quantized[name])
        cosines.append(float(_cosine(before.flatten(), after.flatten())))
    return float(np.mean(cosines))


def _finite_pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, in float64, the tokens that are finite in both."""
    both = a.isfinite().all(-1) & b.isfinite().all(-1)
    return a[both].double(), b[both].double()


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norms > 0, (a * b).sum(-1) / norms, 0)


def _count_nonfinite(tokens: torch.Tensor) -> int:
    return int((~tokens.isfinite()).sum())


def grade(cosine: float) -> str:
    """Return the plan's grade of a flattened cosine: EXCELLENT, GOOD, FAIR or POOR."""
    return next((name for limit, name in GRADES if cosine >= limit), "POOR")
