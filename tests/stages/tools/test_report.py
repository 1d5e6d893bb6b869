import base64
import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from colqwen3.system.errors import UserError
from stages.checking.params import Params
from stages.pipeline.params import PARAMS_FILE, load_params
from stages.tools import report
from stages.tools.report import Result, render

HOSTILE = "<script>alert('x')</script>\"&"
PNG = b"\x89PNG made up"


def figure(original: float, quantized: float, low: float, high: float) -> dict[str, float]:
    difference = quantized - original
    values = (original, quantized, difference, low, high)
    return dict(zip(("original", "quantized", "difference", "low", "high"), values, strict=True))


def made_up(page: float = 0.9812) -> dict[str, Any]:
    retrieval = {
        "ndcg_at_5": figure(0.9111, 0.8222, -0.1333, 0.0444),
        "recall_at_1": figure(0.7011, 0.6022, -0.2, 0.1),
        "margin": figure(1.5, 1.25, -0.3055, -0.2066),
        "top1_agreement": 0.7377,
    }
    return {
        "data": {"queries": 17, "pages": 23},
        "queries": {
            "cosine": {"mean": 0.9734, "p01": 0.9123, "min": 0.8},
            "flattened_cosine": 0.9645,
            "grade": "EXCELLENT",
            "nonfinite": 0,
        },
        "pages": {"cosine": {"mean": page, "p01": 0.9234, "min": 0.8}, "nonfinite": 0},
        "retrieval": retrieval,
        "mixed_index": {**retrieval, "ndcg_at_5": figure(0.9111, 0.8567, -0.1, 0.1)},
        "size": {"files": {"original": 10_790_224, "quantized": 7_304_168, "reduction_percent": 32.3}},
    }  # fmt: skip


SPEED: dict[str, Any] = {
    "query": {"batches": {"1": {"best": {"original_ms": 10.25, "quantized_ms": 124.26, "speedup": 0.08}}}},
    "page": {"batches": {"1": {"best": {"original_ms": 200.02, "quantized_ms": 846.45, "speedup": 0.24}}}},
    "setting": {
        "device": "Abacus 9000", "threads": 3, "dtype": "float32", "kernel": "dense",
        "torch": "2.13.0",
    },
}  # fmt: skip
LAYERS = [{"layer": f"{block}.mlp.up_proj", "error": 0.1} for block in range(2)]
SCORES = [
    {"query": f"q{number}", "original": 10.0, "quantized": 10.0 + (-1) ** number * number / 8}
    for number in range(9)
]
FIGURES = (
    "EXCELLENT (0.9645)", "0.9734 (0.9123)", "0.9812 (0.9234)", "0.911 → 0.822",
    "-0.089 (-0.133 … +0.044)", "0.857", "0.701 → 0.602", "73.8 %", "-0.250 (-0.305 … -0.207)",
    "10,790,224 → 7,304,168 bytes", "32.3 %", "10.2 → 124.3 ms (speed-up 0.08)",
    "200.0 → 846.5 ms (speed-up 0.24)",
    "Abacus 9000, threads: 3, float32, kernel: dense, torch 2.13.0",
)  # fmt: skip


def result(**given: Any) -> Result:
    fields = {
        "metrics": made_up(), "speed": SPEED, "layers": LAYERS, "scores": SCORES,
        "heatmap": PNG, "breaches": [],
    }  # fmt: skip
    return Result(**{**fields, **given})


class Reader(HTMLParser):
    """Collects every tag with its attributes, the table cells, captions and other texts."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open, []).append(data)


@pytest.fixture
def params() -> Params:
    return load_params()


def test_the_report_has_each_figure_of_each_recipe(params: Params) -> None:
    results = {"first": result(), "second": result(breaches=["limit of bytes"])}
    read = Reader(render(params, results, {"q8": "text of q8"}))
    cells = read.texts["td"]
    for text in FIGURES:
        assert cells.count(text) == 2, text
    assert cells.count("within every limit") == cells.count("limit of bytes") == 1
    assert {"first", "second"} <= set(read.texts["th"])


def test_each_table_says_what_was_measured(params: Params) -> None:
    captions = Reader(render(params, {"a": result()}, {})).texts["caption"]
    captions = [text for text in captions if text.strip()]
    assert len(captions) == 2
    for caption in captions:
        wanted = (params.model.source, params.evaluate.dataset, "17 queries, 23 pages", "device")
        assert all(text in caption for text in wanted)


def test_the_queries_that_moved_most_are_listed_with_their_text(params: Params) -> None:
    queries = {f"q{number}": f"text {number}" for number in range(9)}
    cells = Reader(render(params, {"a": result()}, queries)).texts["td"]
    texts = [cell for cell in cells if cell.startswith("text ")]
    assert texts == ["text 8", "text 7", "text 6", "text 5", "text 4"]
    assert "10.000 → 9.125" in cells
    assert "-0.875" in cells


def test_nothing_is_fetched(params: Params) -> None:
    html = render(params, {"a": result(), "b": result()}, {})
    read = Reader(html)
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for key, value in attributes.items():
            if key in ("src", "href", "srcset", "action", "data"):
                assert str(value).startswith("data:image/"), (tag, key)
    assert not re.search(r"https?:|url\(|@import", html)
    pictures = [str(attributes["src"]) for tag, attributes in read.tags if tag == "img"]
    assert len(pictures) == 3 + 2
    drawn = [base64.b64decode(picture.partition(",")[2]) for picture in pictures]
    assert all(svg.startswith(b"<svg") and b"href" not in svg for svg in drawn[:3])
    assert drawn[3:] == [PNG, PNG]


def test_hostile_names_and_texts_stay_text(params: Params) -> None:
    source = params.model.model_copy(update={"source": HOSTILE})
    hostile = params.model_copy(update={"model": source})
    one = result(breaches=[HOSTILE], scores=[{"query": HOSTILE, "original": 1.0, "quantized": 2.0}])
    html = render(hostile, {HOSTILE: one}, {HOSTILE: HOSTILE})
    assert "<script" not in html
    read = Reader(html)
    assert HOSTILE in read.texts["th"]  # the recipe
    assert read.texts["td"].count(HOSTILE) == 3  # breach, query, its text


def test_params_are_shown_whole(params: Params) -> None:
    (text,) = [t for t in Reader(render(params, {"a": result()}, {})).texts["pre"] if t.strip()]
    assert yaml.safe_load(text) == params.model_dump()


def test_equal_results_give_an_equal_report(params: Params) -> None:
    first = render(params, {"a": result()}, {})
    assert first == render(params, {"a": copy.deepcopy(result())}, {})
    assert first != render(params, {"a": result(metrics=made_up(page=0.97))}, {})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params of one recipe, "x", and all that the stages write about it."""
    params = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text())
    rtn = {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True}
    params["recipes"] = {"x": rtn}
    params["evaluate"]["dataset"] = "data"
    params["gate"] = dict.fromkeys(params["gate"]) | {"min_page_cosine": 0.99}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report"])
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    for name, value in {
        "metrics/x.json": made_up(),
        "metrics/speed/x.json": SPEED,
        "metrics/plots/x/layers.json": LAYERS,
        "metrics/plots/x/scores.json": SCORES,
        "data/queries.jsonl": {"_id": "q1", "text": "one"},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "metrics/plots/x/heatmap.png").write_bytes(PNG)
    return tmp_path


def test_the_stage_reads_what_the_others_wrote_and_says_which_limit_broke(project: Path) -> None:
    report.main()
    cells = Reader((project / "artifacts/report/index.html").read_text()).texts["td"]
    assert set(FIGURES) <= set(cells)
    assert "pages.cosine.mean 0.9812 is below gate.min_page_cosine 0.99" in cells


def test_a_report_linked_into_the_cache_is_replaced_not_changed(project: Path) -> None:
    cached = project / "cached"
    cached.write_text("old")
    linked = project / "artifacts/report/index.html"
    linked.parent.mkdir(parents=True)
    linked.hardlink_to(cached)
    report.main()
    assert cached.read_text() == "old"
    assert linked.read_text() != "old"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("x.json", "evaluate@x"),
        ("speed/x.json", "benchmark@x"),
        ("plots/x/layers.json", "quantize@x"),
        ("plots/x/scores.json", "evaluate@x"),
        ("plots/x/heatmap.png", "heatmap@x"),
    ],
)
def test_a_missing_file_names_the_stage_that_writes_it(
    project: Path, name: str, stage: str
) -> None:
    (project / "metrics" / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)}: .*dvc repro {stage}"):
        report.main()


def test_missing_figures_fail_in_one_line(project: Path) -> None:
    (project / "metrics/speed/x.json").write_text("{}")
    with pytest.raises(UserError, match="metrics: lacks a figure"):
        report.main()
