"""Queries whose result is another one after quantization, the worst first."""

from collections.abc import Iterable, Mapping
from typing import Any

DRAWN = 10
"""How many of them are drawn with their pages, so that a report stays small."""

Result = Mapping[str, Any]
"""A query of ``metrics/queries/<recipe>.json``."""


def harm(result: Result) -> float:
    """Return what the query lost of its reciprocal rank (1 / rank of the best relevant page).

    Falling from the first place to the second harms more than falling from the tenth to the last.
    """
    return float(1 / result["original"]["rank"] - 1 / result["quantized"]["rank"])


def find_changed(results: Iterable[Result]) -> list[Result]:
    """Return the queries whose first page or rank of the best relevant page changed.

    The most harmed come first, those that gained come last; ties keep their order.
    """
    changed = [
        result
        for result in results
        if any(result["original"][key] != result["quantized"][key] for key in ("first", "rank"))
    ]
    return sorted(changed, key=lambda result: -harm(result))


def choose_drawn(results: Iterable[Result]) -> list[Result]:
    """Return the queries to draw: the most harmed, none that gained."""
    return [result for result in find_changed(results) if harm(result) >= 0][:DRAWN]
