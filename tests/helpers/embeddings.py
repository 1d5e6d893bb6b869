"""Embeddings of a small dataset by two models, the second one a noisy copy of the first."""

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
