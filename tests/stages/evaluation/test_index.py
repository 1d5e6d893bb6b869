"""Formats of an index: figures of small sets by hand, and the order in which formats cost."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from colqwen3.corpus.formats import FORMATS
from colqwen3.dataset.beir import Dataset
from colqwen3.dataset.pages import Page
from colqwen3.embedding.store import Embeddings
from stages.evaluation.index import compare_formats
from stages.pipeline.params import IndexFormat
from tests.helpers.embeddings import by_loop

WIDTH = 16


def unit(seed: int, tokens: int) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(size=(tokens, WIDTH))
    return torch.tensor(values / np.linalg.norm(values, axis=1, keepdims=True), dtype=torch.float32)


QUERIES = {f"q{number}": unit(number, 4) for number in range(12)}
PAGES = {f"p{number:02}": unit(100 + number, 6 + number % 3) for number in range(40)}
NOISY = {name: torch.nn.functional.normalize(page + 0.3 * unit(7, len(page)), dim=-1)
         for name, page in PAGES.items()}  # fmt: skip


def best(queries: dict[str, torch.Tensor], pages: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """The five best pages of each query, without the code under test."""
    return {
        name: sorted(pages, key=lambda page: -by_loop(query, pages[page]))[:5]
        for name, query in queries.items()
    }


DATASET = Dataset(
    dict.fromkeys(QUERIES, "text"), dict.fromkeys(PAGES, Page(Path("x"))),
    {name: {pages[0]: 1} for name, pages in best(QUERIES, PAGES).items()},
)  # fmt: skip


def compare(*formats: str) -> dict[str, Any]:
    original, quantized = Embeddings(QUERIES, PAGES), Embeddings(QUERIES, NOISY)
    return compare_formats(DATASET, original, quantized, formats)


def test_params_name_every_format() -> None:
    assert get_args(IndexFormat) == tuple(FORMATS)


def test_exact_search_is_the_measure_of_all() -> None:
    exact = compare()["float32"]
    tokens = sum(map(len, PAGES.values()))
    assert exact["bytes_per_page"] == round(tokens * WIDTH * 4 / 40)
    assert exact["original"] == {"ndcg_at_5": 1.0, "top5_overlap": 1.0}
    pairs = zip(best(QUERIES, PAGES).values(), best(QUERIES, NOISY).values(), strict=True)
    shared = [len(set(one) & set(other)) / 5 for one, other in pairs]
    assert exact["quantized"]["top5_overlap"] == pytest.approx(np.mean(shared))
    assert 0 < exact["quantized"]["top5_overlap"] < 1


def test_binary_scores_are_those_of_signs() -> None:
    signs = {name: torch.where(page > 0, 1.0, -1.0) for name, page in PAGES.items()}
    pairs = zip(best(QUERIES, PAGES).values(), best(QUERIES, signs).values(), strict=True)
    shared = [len(set(one) & set(other)) / 5 for one, other in pairs]
    binary = compare("binary")["binary"]
    assert binary["original"]["top5_overlap"] == pytest.approx(np.mean(shared))
    assert binary["bytes_per_page"] == round(sum(map(len, PAGES.values())) * WIDTH / 8 / 40)


def test_coarser_formats_take_fewer_bytes_and_find_less() -> None:
    figures = compare("float16", "int8", "pool2-float16", "pool3-int8", "binary")
    assert list(figures) == ["float32", "float16", "int8", "pool2-float16", "pool3-int8", "binary"]
    sizes = [figure["bytes_per_page"] for figure in figures.values()]
    assert sizes == sorted(sizes, reverse=True)
    overlaps = [figure["original"]["top5_overlap"] for figure in figures.values()]
    assert overlaps[1] == 1.0
    assert overlaps[2] > max(overlaps[3:])
    json.dumps(figures, allow_nan=False)


def test_tokens_that_are_not_finite_count_as_zero_vectors() -> None:
    broken = {name: page.clone() for name, page in PAGES.items()}
    broken["p00"][1, 2] = torch.nan
    original, quantized = Embeddings(QUERIES, PAGES), Embeddings(QUERIES, broken)
    figures = compare_formats(DATASET, original, quantized, ["int8", "pool2-int8"])
    json.dumps(figures, allow_nan=False)
