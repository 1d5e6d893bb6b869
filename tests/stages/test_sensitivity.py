"""The samples that the sensitivity is measured on, and what the stage writes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from colqwen3.system.errors import UserError
from stages import calibrate, inspect_model, sensitivity
from stages.budget.options import SensitivityParams
from stages.quantization.samples import Origin
from stages.sensitivity import bars, choose_samples
from tests.helpers.work import make_work, write_params


def wanted(pages: int, queries: int) -> SensitivityParams:
    return SensitivityParams(calibration="some", pages=pages, queries=queries, group_size=32)


def origins(kinds: str) -> list[Origin]:
    """Return origins by the first letters of their kinds: p for page, q for query, t for text."""
    names: dict[str, Any] = {"p": "page", "q": "query", "t": "passage"}
    return [Origin(names[kind], str(place), 1, "") for place, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("kinds", "pages", "queries", "places"),
    [
        ("qqqppp", 1, 2, [0, 1, 3]),
        ("pqpqpq", 2, 1, [0, 1, 2]),
        ("pttq", 5, 2, [0, 1, 2]),  # a passage counts as a query
        ("pq", 8, 32, [0, 1]),
    ],
)
def test_the_first_pages_and_queries_are_taken(
    kinds: str, pages: int, queries: int, places: list[int]
) -> None:
    assert choose_samples(origins(kinds), wanted(pages, queries)) == places


@pytest.mark.parametrize(("kinds", "missing"), [("ppp", "queries"), ("qt", "pages")])
def test_a_set_of_one_kind_is_refused(kinds: str, missing: str) -> None:
    with pytest.raises(UserError, match=f"the set some has no {missing}; name one with pages and"):
        choose_samples(origins(kinds), wanted(1, 1))


def test_the_plot_has_a_bar_for_every_part_and_width() -> None:
    items = {
        "a": {"loss": {"4": {"pages": 0.1, "queries": 0.2}, "8": {"pages": 0.0, "queries": 0}}}
    }
    first, second = bars({"items": items})
    assert first == {"part": "a", "bits": 4, "bar": "a, 4 bits", "pages": 0.1, "queries": 0.2}
    assert (second["part"], second["bits"]) == ("a", 8)
    assert bars({}) == []


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_work(tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


def run_stage(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__.rpartition(".")[2]])
    module.main()


def test_without_a_set_nothing_is_measured(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage(monkeypatch, sensitivity)
    assert json.loads((work / "artifacts/sensitivity.json").read_text()) == {"items": {}}
    assert json.loads((work / "metrics/plots/sensitivity.json").read_text()) == []


def test_a_model_whose_vision_tower_cannot_be_quantized_is_measured(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden model has a vision tower that is 36 wide."""
    params = YAML(typ="safe").load(work / "params.yaml")
    params["sensitivity"].update(calibration="some", pages=1, queries=1, group_size=32)
    write_params(work, params)
    for module in (inspect_model, calibrate, sensitivity):
        run_stage(monkeypatch, module)
    result = json.loads((work / "artifacts/sensitivity.json").read_text())
    assert result["samples"] == {"pages": 1, "queries": 1}
    losses = [loss for item in result["items"].values() for loss in item["loss"].values()]
    assert all(loss["pages"] >= 0 and loss["queries"] >= 0 for loss in losses)
