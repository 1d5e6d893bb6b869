import math
from typing import Any

import numpy as np
import pytest
import torch

from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings
from colqwen3.system.errors import UserError
from stages.evaluation import comparison
from stages.evaluation.comparison import check_items, evaluate, round_figures, round_points
from stages.evaluation.cosine import Items
from tests.helpers.embeddings import (
    DATASET,
    DIM,
    ORIGINAL,
    PAGES,
    QUANTIZED,
    QUERIES,
    RELEVANCE,
    by_loop,
    cosine,
    token_cosines,
)

NAN, INF = float("nan"), float("inf")


def retrieval_by_loop(queries: Embeddings, pages: Embeddings) -> dict[str, float]:
    """nDCG@5 and recall@1 and the margin, without the code under test."""
    ndcg, recall, margin = [], [], []
    for name, judged in RELEVANCE.items():
        scores = {stem: by_loop(queries.queries[name], pages.pages[stem]) for stem in PAGES}
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        gains = [judged.get(stem, 0) / math.log2(rank + 2) for rank, stem in enumerate(ranked)]
        best = sorted(judged.values(), reverse=True)
        ndcg.append(sum(gains) / sum(gain / math.log2(rank + 2) for rank, gain in enumerate(best)))
        recall.append((ranked[0] in judged) / len(judged))
        others = [score for stem, score in scores.items() if stem not in judged]
        margin.append(max(scores[stem] for stem in judged) - max(others))
    figures = {"ndcg_at_5": ndcg, "recall_at_1": recall, "margin": margin}
    return {name: sum(values) / len(values) for name, values in figures.items()}


def margins_by_loop(side: Embeddings) -> list[float]:
    margins = []
    for name, judged in RELEVANCE.items():
        scores = {stem: by_loop(side.queries[name], side.pages[stem]) for stem in PAGES}
        others = [score for stem, score in scores.items() if stem not in judged]
        margins.append(max(scores[stem] for stem in judged) - max(others))
    return margins


def test_retrieval_and_mixed_index_equal_a_loop() -> None:
    metrics, _, _ = evaluate(DATASET, ORIGINAL, QUANTIZED)
    original = retrieval_by_loop(ORIGINAL, ORIGINAL)
    for section, pages in (("retrieval", QUANTIZED), ("mixed_index", ORIGINAL)):
        quantized = retrieval_by_loop(QUANTIZED, pages)
        for name, value in quantized.items():
            figures = metrics[section][name]
            assert figures["original"] == pytest.approx(original[name], abs=1e-6)
            assert figures["quantized"] == pytest.approx(value, abs=1e-6)
            assert figures["difference"] == pytest.approx(value - original[name], abs=1e-6)
    # the two differ, or the test would not tell them apart
    assert metrics["retrieval"]["margin"] != metrics["mixed_index"]["margin"]


def test_points_are_the_scores_of_the_best_relevant_page() -> None:
    _, points, _ = evaluate(DATASET, ORIGINAL, QUANTIZED)
    assert [point["query"] for point in points] == list(QUERIES)
    for point in points:
        for key, side in (("original", ORIGINAL), ("quantized", QUANTIZED)):
            query = side.queries[point["query"]]
            best = max(by_loop(query, side.pages[stem]) for stem in RELEVANCE[point["query"]])
            assert point[key] == pytest.approx(best, abs=1e-6)


def test_results_are_the_first_page_and_the_rank_of_the_best_relevant_one() -> None:
    _, _, results = evaluate(DATASET, ORIGINAL, QUANTIZED)
    assert [result["query"] for result in results] == list(QUERIES)
    for result in results:
        for key, side in (("original", ORIGINAL), ("quantized", QUANTIZED)):
            query = side.queries[result["query"]]
            scores = {stem: by_loop(query, side.pages[stem]) for stem in PAGES}
            ranked = sorted(scores, key=scores.__getitem__, reverse=True)
            best = next(stem for stem in ranked if stem in RELEVANCE[result["query"]])
            expected = {"first": ranked[0], "relevant": best, "rank": ranked.index(best) + 1}
            assert result[key] == expected


def test_the_size_of_batches_of_pages_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(DATASET, ORIGINAL, QUANTIZED)
    monkeypatch.setattr(comparison, "BATCH", 3)
    parts = evaluate(DATASET, ORIGINAL, QUANTIZED)
    assert parts.results == whole.results
    assert round_figures(parts.metrics) == round_figures(whole.metrics)


def test_figures_are_rounded_by_what_they_are() -> None:
    value = 0.123456789
    metrics = {"cosine": {"mean": value}, "flattened_cosine": value, "margin": value, "n": 3}
    assert round_figures({"a": metrics}) == {
        "a": {"cosine": {"mean": 0.123457}, "flattened_cosine": 0.123457, "margin": 0.12346, "n": 3}
    }
    point = {"query": "q", "original": 12.34567, "quantized": 1.0}
    assert round_points([point]) == [{"query": "q", "original": 12.346, "quantized": 1.0}]


def test_an_equal_model_loses_nothing() -> None:
    metrics, _, _ = evaluate(DATASET, ORIGINAL, ORIGINAL)
    assert round_figures(metrics["queries"]["cosine"]) == {"mean": 1, "p01": 1, "min": 1}
    assert metrics["queries"]["grade"] == "EXCELLENT"
    figures = metrics["retrieval"]
    assert figures["top1_agreement"] == figures["top5_overlap"] == 1
    assert figures["spearman"] == pytest.approx(1)
    # three queries that lost nothing still allow a loss in 63 % of all queries: 1 - 0.05 ** (1 / 3)
    scale = {"margin": max(map(abs, margins_by_loop(ORIGINAL)))}
    for name in ("ndcg_at_5", "ndcg_at_10", "recall_at_1", "recall_at_5", "margin"):
        allowed = (1 - 0.05 ** (1 / 3)) * scale.get(name, 1)
        assert figures[name]["difference"] == 0
        assert (figures[name]["low"], figures[name]["high"]) == pytest.approx((-allowed, allowed))
        assert figures[name]["smallest_visible_loss"] == pytest.approx(allowed)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    return [] if isinstance(value, str) else [value]


def with_rows(items: Items, name: str, rows: dict[int, list[float]]) -> dict[str, torch.Tensor]:
    changed = items[name].clone()
    for row, values in rows.items():
        changed[row, : len(values)] = torch.tensor(values)
    return {**items, name: changed}


def test_nonfinite_values_are_counted_and_every_figure_stays_finite() -> None:
    queries = with_rows(QUANTIZED.queries, "q1", {1: [NAN, INF]})
    pages = with_rows(QUANTIZED.pages, "a", {0: [-INF]})
    pages = with_rows(pages, "d", {0: [NAN] * DIM})  # a page without a finite token
    broken = Embeddings(queries, pages)
    original = Embeddings(ORIGINAL.queries, with_rows(ORIGINAL.pages, "c", {4: [NAN]}))
    metrics, points, _ = evaluate(DATASET, original, broken)
    assert all(math.isfinite(number) for number in numbers(metrics) + numbers(points[0]))
    assert (metrics["queries"]["nonfinite"], metrics["queries"]["nonfinite_original"]) == (2, 0)
    assert (metrics["pages"]["nonfinite"], metrics["pages"]["nonfinite_original"]) == (1 + DIM, 1)


def test_nonfinite_tokens_are_left_out_of_cosines_and_of_scores() -> None:
    original = Embeddings(ORIGINAL.queries, with_rows(ORIGINAL.pages, "c", {4: [0.0, NAN]}))
    queries = with_rows(QUANTIZED.queries, "q1", {1: [NAN, INF]})
    pages = with_rows(QUANTIZED.pages, "a", {0: [-INF]})

    def cut(items: Items, name: str, row: int) -> dict[str, torch.Tensor]:
        return {**items, name: torch.cat([items[name][:row], items[name][row + 1 :]])}

    metrics, _, _ = evaluate(DATASET, original, Embeddings(queries, pages))
    # the same tokens taken out by hand; a score keeps those that only the other model lacks
    after = Embeddings(cut(queries, "q1", 1), cut(pages, "a", 0))
    before = Embeddings(cut(original.queries, "q1", 1), cut(cut(original.pages, "a", 0), "c", 4))
    both = Embeddings(after.queries, cut(after.pages, "c", 4))
    for kind in ("queries", "pages"):
        expected = token_cosines(getattr(before, kind), getattr(both, kind))
        assert metrics[kind]["cosine"]["mean"] == pytest.approx(np.mean(expected))
        assert metrics[kind]["cosine"]["min"] == pytest.approx(expected[0])
    flattened = [
        cosine(before.queries[name].flatten().tolist(), after.queries[name].flatten().tolist())
        for name in QUERIES
    ]
    assert metrics["queries"]["flattened_cosine"] == pytest.approx(np.mean(flattened), abs=1e-7)
    for name, value in retrieval_by_loop(after, after).items():
        assert metrics["retrieval"][name]["quantized"] == pytest.approx(value, abs=1e-6)


def test_a_page_without_a_finite_token_scores_0() -> None:
    dataset = Dataset(DATASET.queries, DATASET.pages, {name: {"d": 1} for name in QUERIES})
    pages = with_rows(QUANTIZED.pages, "d", {0: [NAN]})
    _, points, _ = evaluate(dataset, ORIGINAL, Embeddings(QUANTIZED.queries, pages))
    assert [point["quantized"] for point in points] == [0, 0, 0]


def test_a_model_of_nothing_but_nan_has_cosine_0() -> None:
    broken = {name: torch.full_like(tokens, NAN) for name, tokens in ORIGINAL.queries.items()}
    metrics, _, _ = evaluate(DATASET, ORIGINAL, Embeddings(broken, ORIGINAL.pages))
    assert metrics["queries"]["cosine"] == {"mean": 0, "p01": 0, "min": 0}
    assert (metrics["queries"]["flattened_cosine"], metrics["queries"]["grade"]) == (0, "POOR")


def without(items: Items, name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in items.items() if key != name}


@pytest.mark.parametrize(
    ("original", "quantized", "reason"),
    [
        (
            ORIGINAL,
            Embeddings(without(QUANTIZED.queries, "q1"), QUANTIZED.pages),
            "lack query 'q1'",
        ),
        (ORIGINAL, Embeddings(QUANTIZED.queries, without(QUANTIZED.pages, "c")), "lack page 'c'"),
        (
            Embeddings(ORIGINAL.queries, {**ORIGINAL.pages, "x": ORIGINAL.pages["a"]}),
            QUANTIZED,
            "hold an unknown page 'x'",
        ),
        (
            ORIGINAL,
            Embeddings(QUANTIZED.queries, {**QUANTIZED.pages, "b": torch.ones(4, DIM)}),
            "page 'b' is [5, 6] in the original embeddings, [4, 6] in the quantized",
        ),
        (
            ORIGINAL,
            Embeddings({**QUANTIZED.queries, "q3": torch.ones(5, 2)}, QUANTIZED.pages),
            "query 'q3' is [5, 6]",
        ),
    ],
)
def test_refuses_embeddings_of_other_items_or_shapes(
    original: Embeddings, quantized: Embeddings, reason: str
) -> None:
    check_items(DATASET, ORIGINAL, QUANTIZED)
    with pytest.raises(UserError) as caught:
        check_items(DATASET, original, quantized)
    assert reason in str(caught.value)
