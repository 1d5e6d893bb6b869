from typing import Any

import pytest

from stages.evaluation.limits import NO_LOSS, WITHIN, WORSE, GateParams, judge
from tests.helpers.metrics import contrast, quality

OFF = GateParams(**dict.fromkeys(GateParams.model_fields))
SAME = contrast(0.9, 0.899, -0.01, 0.008)


def metrics(**changes: Any) -> dict[str, Any]:
    return quality(**{"ndcg": SAME, **changes})


def test_no_measurable_loss_says_what_could_not_have_been_seen() -> None:
    verdict = judge(metrics(), OFF)
    assert verdict.verdict == NO_LOSS
    assert verdict.breaches == []
    for part in ("66 of 252 first pages changed", "up to 31.1 %", "nDCG@5 below 0.009"):
        assert part in verdict.reason


@pytest.mark.parametrize("name", ["ndcg_at_5", "recall_at_1", "margin"])
def test_an_interval_below_zero_is_a_measurable_loss(name: str) -> None:
    lost = metrics()
    lost["retrieval"][name] = contrast(0.9, 0.85, -0.08, -0.0001)
    verdict = judge(lost, OFF)
    assert verdict.verdict == WITHIN
    assert "measurable loss" in verdict.reason
    assert "-0.0500 (95 % -0.0800 to -0.0001)" in verdict.reason
    lost["retrieval"][name] = contrast(0.9, 0.85, -0.08, 0.0)
    assert judge(lost, OFF).verdict == NO_LOSS


@pytest.mark.parametrize(("queries", "expected"), [(99, WITHIN), (100, NO_LOSS)])
def test_few_queries_cannot_show_that_nothing_was_lost(queries: int, expected: str) -> None:
    assert judge(metrics(queries=queries), OFF).verdict == expected


def test_none_of_24_changed_still_allows_12_percent() -> None:
    few = metrics(queries=24)
    few["retrieval"]["first_pages"] = {"changed": 0, "changed_share_at_most": 1 - 0.05 ** (1 / 24)}
    verdict = judge(few, OFF)
    assert verdict.verdict == WITHIN
    assert "0 of 24 first pages changed, which allows up to 11.7 %" in verdict.reason
    assert "24 queries on 126 pages are too few" in verdict.reason


def test_a_broken_limit_is_worse_whatever_else_is_said() -> None:
    gate = OFF.model_copy(update={"min_page_cosine": 0.99, "max_margin_drop": 0.0})
    verdict = judge(metrics(), gate)
    assert verdict.verdict == WORSE
    assert len(verdict.breaches) == 2
    assert verdict.reason == f"{verdict.breaches[0]} (and 1 more)"


@pytest.mark.parametrize(
    ("overlap", "text"),
    [
        ({"same_folder": True, "pages": 3, "queries": 4}, "measured on the dataset that it was"),
        ({"same_folder": False, "pages": 3, "queries": 0}, "3 pages and 0 queries are also in"),
        ({"same_folder": False, "pages": 0, "queries": 4}, "0 pages and 4 queries are also in"),
    ],
)
def test_what_was_tuned_on_cannot_show_that_nothing_was_lost(
    overlap: dict[str, Any], text: str
) -> None:
    verdict = judge(metrics(overlap=overlap), OFF)
    assert verdict.verdict == WITHIN
    assert text in verdict.reason
    gate = OFF.model_copy(update={"min_page_cosine": 0.99})
    assert text in judge(metrics(overlap=overlap), gate).reason


def test_values_that_are_not_finite_are_told_even_without_a_limit() -> None:
    verdict = judge(metrics(nonfinite=(2, 3)), OFF)
    assert verdict.verdict == WITHIN
    assert "5 values of its embeddings are NaN or Inf" in verdict.reason


@pytest.mark.parametrize(("pages", "verdict"), [(20, NO_LOSS), (19, WITHIN)])
def test_few_pages_cannot_show_that_nothing_was_lost(pages: int, verdict: str) -> None:
    judged = judge(metrics(data={"queries": 100, "pages": pages}), OFF)
    assert judged.verdict == verdict
    assert ("100 queries on 19 pages are too few" in judged.reason) == (verdict == WITHIN)


def test_a_loss_on_the_originals_pages_is_a_loss() -> None:
    figures = metrics()
    figures["mixed_index"]["ndcg_at_5"].update(difference=-0.05, low=-0.08, high=-0.01)
    verdict = judge(figures, OFF)
    assert verdict.verdict == WITHIN
    assert "nDCG@5 on the original's pages" in verdict.reason


def test_the_originals_values_that_are_not_finite_are_told() -> None:
    figures = metrics()
    figures["pages"]["nonfinite_original"] = 7
    assert "7 values of the original's embeddings are NaN or Inf" in judge(figures, OFF).reason
