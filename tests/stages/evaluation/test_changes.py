from typing import Any

import pytest

from stages.evaluation.changes import DRAWN, choose_drawn, find_changed, harm


def result(name: str, before: int, after: int, first: str = "a", then: str = "a") -> dict[str, Any]:
    return {
        "query": name,
        "original": {"first": first, "rank": before},
        "quantized": {"first": then, "rank": after},
    }


RESULTS = [
    result("same", 4, 4),
    result("gained", 2, 1, "a", "b"),
    result("far down", 50, 90),
    result("lost the first place", 1, 2, "a", "b"),
    result("another wrong page", 3, 3, "a", "b"),
    result("fell deep", 1, 9, "a", "c"),
]


def test_harm_is_the_loss_of_reciprocal_rank() -> None:
    assert harm(result("x", 1, 4)) == pytest.approx(0.75)
    assert harm(result("x", 2, 1)) == pytest.approx(-0.5)


def test_changed_queries_come_worst_first() -> None:
    assert [each["query"] for each in find_changed(RESULTS)] == [
        "fell deep", "lost the first place", "far down", "another wrong page", "gained",
    ]  # fmt: skip


def test_few_are_drawn_and_none_that_gained() -> None:
    assert [each["query"] for each in choose_drawn(RESULTS)] == [
        "fell deep", "lost the first place", "far down", "another wrong page",
    ]  # fmt: skip
    many = [result(f"q{number}", 1, 2) for number in range(2 * DRAWN)]
    assert [each["query"] for each in choose_drawn(many)] == [f"q{n}" for n in range(DRAWN)]
