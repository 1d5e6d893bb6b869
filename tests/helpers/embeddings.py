"""Embeddings of a small dataset by two models, the second one a noisy copy of the first."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from colqwen3.dataset.beir import Dataset
from colqwen3.dataset.pages import Page
from colqwen3.embedding.store import Embeddings

DIM = 6
QUERIES = {"q2": 4, "q1": 3, "q3": 5}  # id -> tokens
PAGES = {"a": 7, "b": 5, "c": 9, "d": 1}
RELEVANCE = {"q2": {"a": 1}, "q1": {"c": 2, "d": 1}, "q3": {"b": 1}}


def draw(seed: int, noise: float) -> Embeddings:
    """Unit tokens that are the same for every seed but for the noise."""

    def items(counts: dict[str, int], base: int) -> dict[str, torch.Tensor]:
        drawn = {}
        for number, (name, tokens) in enumerate(counts.items()):
            values = np.random.default_rng(base + number).normal(size=(tokens, DIM))
            values += noise * np.random.default_rng([seed, base + number]).normal(size=values.shape)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            drawn[name] = torch.tensor(values, dtype=torch.float32)
        return drawn

    return Embeddings(items(QUERIES, 100), items(PAGES, 200))


DATASET = Dataset(dict.fromkeys(QUERIES, "text"), dict.fromkeys(PAGES, Page(Path("x"))), RELEVANCE)
ORIGINAL, QUANTIZED = draw(0, 0.0), draw(1, 0.4)


def by_loop(query: torch.Tensor, page: torch.Tensor) -> float:
    """MaxSim, without the code under test."""
    products = query.double().numpy() @ page.double().numpy().T
    return math.fsum(max(row) for row in products.tolist())


def cosine(a: list[float], b: list[float]) -> float:
    """Cosine of two vectors, without the code under test."""
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms


def token_cosines(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> list[float]:
    """Cosines of all tokens, ascending."""
    return sorted(
        cosine(a, b)
        for name in before
        for a, b in zip(before[name].tolist(), after[name].tolist(), strict=True)
    )


def unit(seed: int, tokens: int) -> torch.Tensor:
    """Random unit tokens of width 5."""
    values = np.random.default_rng(seed).normal(size=(tokens, 5))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return torch.tensor(values, dtype=torch.float32)
