"""Warnings of calibration sets that have too few samples of a kind."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from stages.calibration.sets import CalibrationSet
from stages.checking.datasets import unbalanced_sets


def warnings(queries: int, pages: int, passages: int) -> list[str]:
    sets = {"mine": CalibrationSet(queries=queries, pages=pages, passages=passages)}
    assert unbalanced_sets(sets, []) == []  # a set that no recipe is tuned on
    return unbalanced_sets(sets, ["mine"])


@pytest.mark.parametrize(
    "counts", [(96, 48, 0), (16, 16, 0), (0, 48, 16), (8, 16, 8), (96, 48, 32)]
)
def test_sets_with_enough_of_each_kind_are_left_alone(counts: tuple[int, int, int]) -> None:
    assert warnings(*counts) == []


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((96, 0, 0), [" has no pages"]),
        ((0, 0, 16), [" has no pages"]),
        ((96, 15, 0), [".pages is 15, fewer than the 16"]),
        ((0, 48, 0), [" has no queries and no passages"]),
        ((10, 48, 5), [": queries and passages are 15 together, fewer than the 16"]),
        ((1, 1, 0), [".pages is 1,", ": queries and passages are 1 together"]),
        ((0, 0, 1), [" has no pages", ": queries and passages are 1 together"]),
    ],
)
def test_too_few_of_a_kind_is_one_line_each(counts: tuple[int, int, int], told: list[str]) -> None:
    lines = warnings(*counts)
    assert len(lines) == len(told)
    for line, part in zip(lines, told, strict=True):
        assert line.startswith(f"params.yaml: calibration.sets.mine{part}")
        assert "; add " in line and line.endswith("(see docs/own-data.md)") and "\n" not in line


def scale_ratios(contender: str) -> list[float]:
    """Page losses over rounding's at 4 and 3 bits, of all study models and page sets."""
    ratios = []
    for path in ("1m", "demo", "39m", "150m"):
        recipes: Any = json.loads(Path(f"metrics/scale/{path}.json").read_text())["recipes"]
        for bits in (4, 3):
            for page_set in ("evaluation", "evaluation2"):
                both = [
                    fmean(
                        recipe["loss"][page_set]["pages"]
                        for recipe in recipes.values()
                        if (recipe["contender"], recipe["bits"]) == (name, bits)
                    )
                    for name in (contender, "rounding")
                ]
                ratios.append(both[0] / both[1])
    return ratios


def test_the_figures_of_the_warnings_are_the_measured_ones() -> None:
    (no_pages,), (no_queries,) = warnings(96, 0, 0), warnings(0, 48, 0)
    assert "0.7 to 1.0 times" in no_pages and "0.1 to 0.2 times" in no_pages
    for contender, low, high in (("text", 0.7, 1.0), ("mixed", 0.1, 0.2)):
        ratios = scale_ratios(contender)
        assert (round(min(ratios), 1), round(max(ratios), 1)) == (low, high)
    folder = Path("demo/studies/ablation/metrics")

    def query_loss(pattern: str) -> float:
        files = [json.loads(path.read_text()) for path in folder.glob(pattern)]
        return fmean(1 - file["evaluation"]["queries"]["cosine"]["mean"] for file in files)

    without = query_loss("pages-naive-w4g128-seed*") / query_loss("mixed-naive-w4g128-seed*")
    assert f"{without:.1f} times" in no_queries
