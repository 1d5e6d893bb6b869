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
from stages.evaluation.limits import WITHIN, WORSE, Verdict
from stages.evaluation.speed import checkpoint_digest, speed_file
from stages.pipeline.params import PARAMS_FILE, load_params
from stages.tools import report
from stages.tools.report import Result, render
from tests.helpers.metrics import quality, write_json

HOSTILE = "<script>alert('x')</script>\"&"
PNG = b"\x89PNG invented"


SPEED: dict[str, Any] = {
    "query": {"batches": {"1": {"best": {"original_ms": 10.25, "quantized_ms": 124.26, "speedup": 0.08}}}},
    "page": {"batches": {"1": {"best": {"original_ms": 200.02, "quantized_ms": 846.45, "speedup": 0.24}}}},
    "setting": {
        "device": "Abacus 9000", "threads": 3, "date": "2026-11-25", "dtype": "float32",
        "kernel": "dense", "torch": "2.13.0",
    },
}  # fmt: skip
LAYERS = [{"layer": f"{block}.mlp.up_proj", "error": 0.1} for block in range(2)]
SCORES = [
    {"query": f"q{number}", "original": 10.0, "quantized": 10.0 + (-1) ** number * number / 8}
    for number in range(9)
]
FIGURES = (
    "0.018800", "0.026600", "0.981200 (0.923400)", "0.973400 (0.912300)",
    "66 of 252 (26.2 %); this many queries allow up to 31.1 %", "41 of 252 (16.3 %)",
    "17 of 252 (6.7 %)", "0.911 → 0.822", "-0.089 (-0.133 … +0.044)", "0.857", "0.701 → 0.602",
    "-0.250 (-0.305 … +0.207)", "10,790,224 → 7,304,168 bytes", "32.3 %",
)  # fmt: skip
TIMES = (
    "batch 1: 10.2 → 124.3 ms (speed-up 0.08)", "batch 1: 200.0 → 846.5 ms (speed-up 0.24)",
    "Abacus 9000, 3 threads, 2026-11-25, float32, kernel: dense, torch 2.13.0",
)  # fmt: skip


def ranked(name: str, before: int, after: int, first: str, then: str) -> dict[str, Any]:
    return {
        "query": name,
        "original": {"first": first, "relevant": "a", "rank": before},
        "quantized": {"first": then, "relevant": "a", "rank": after},
    }


QUERIES = [
    ranked("q1", 1, 1, "page1", "page1"),
    ranked("q2", 3, 2, "page2", "page2"),
    ranked("q3", 1, 4, "page3", "page4"),
    ranked("q4", 1, 2, "page5", "page6"),
]


def result(**given: Any) -> Result:
    fields = {
        "metrics": quality(), "quantization": {}, "queries": QUERIES, "speed": SPEED,
        "layers": LAYERS, "scores": SCORES, "heatmap": PNG, "pictures": {"q3": PNG + b"3"},
        "verdict": Verdict(WITHIN, "some reason"),
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
        if data.strip():
            self.texts.setdefault(self.open, []).append(data)


@pytest.fixture
def params() -> Params:
    return load_params(Params)


def test_the_report_has_each_figure_of_each_recipe(params: Params) -> None:
    failed = result(verdict=Verdict(WORSE, "limit of bytes (and 1 more)", ["limit of bytes", "b"]))
    read = Reader(render(params, {"first": result(), "second": failed}, {"q8": "text of q8"}))
    cells = read.texts["td"]
    for text in (*FIGURES, *TIMES):
        assert cells.count(text) == 2, text
    assert read.texts["strong"] == ["first: within limits", "second: worse"]
    assert {"some reason", "limit of bytes", "b"} <= set(read.texts["span"])
    assert {"first", "second"} <= set(read.texts["th"])


def test_no_timings_of_another_machine_are_shown(params: Params) -> None:
    cells = Reader(render(params, {"a": result(), "b": result(speed=None)}, {})).texts["td"]
    assert all(cells.count(text) == 1 for text in TIMES)
    assert cells.count("not measured on this machine") == 2


def test_each_table_says_what_was_measured(params: Params) -> None:
    captions = Reader(render(params, {"a": result()}, {})).texts["caption"]
    assert len(captions) == 3
    for caption in captions:
        expected = (
            params.model.source,
            params.evaluate.dataset,
            "252 queries, 126 pages",
            "device",
        )
        assert all(text in caption for text in expected)


def test_changed_queries_are_listed_worst_first_with_their_pages(params: Params) -> None:
    texts = {f"q{number}": f"text {number}" for number in range(9)}
    html = render(params, {"a": result(scores=SCORES[:1])}, texts)
    cells = Reader(html).texts["td"]
    start = cells.index("text 3")
    assert cells[start : start + 9] == [
        "text 3", "1 → 4", "page3 → page4",
        "text 4", "1 → 2", "page5 → page6",
        "text 2", "3 → 2", "page2",
    ]  # fmt: skip
    assert "text 1" not in cells
    captions = Reader(html).texts["figcaption"]
    assert [text.strip() for text in captions] == ["text 3"]
    assert "66 of 252 (26.2 %) first pages changed" in html


def test_many_changed_queries_are_cut_and_counted(params: Params) -> None:
    many = [ranked(f"q{number}", 1, 2, "x", "y") for number in range(107)]
    html = render(params, {"a": result(queries=many, pictures={})}, {})
    assert Reader(html).texts["td"].count("1 → 2") == 100
    assert "7 more are in metrics/queries/a.json." in html


def test_a_tuned_recipe_shows_what_tuning_is_for(params: Params) -> None:
    tuned = {"layer_errors": [{"tuned": 0.1, "rounded": 0.2}]}
    both = {"a": result(quantization=tuned), "b": result()}
    headings = Reader(render(params, both, {})).texts["h2"]
    assert "Output error of each tuned layer" in headings
    html = render(params, {"b": result()}, {})
    assert "Output error of each tuned layer" not in Reader(html).texts["h2"]
    assert "larger than that of rounding, and that is no fault" in html


def test_the_queries_that_moved_most_are_listed_with_their_text(params: Params) -> None:
    queries = {f"q{number}": f"text {number}" for number in range(9)}
    cells = Reader(render(params, {"a": result(queries=[])}, queries)).texts["td"]
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
    charts = 7  # three of both recipes, two of each
    drawn = [base64.b64decode(picture.partition(",")[2]) for picture in pictures]
    assert all(svg.startswith(b"<svg") and b"href" not in svg for svg in drawn[:charts])
    assert drawn[charts:] == [PNG, PNG, PNG + b"3", PNG + b"3"]
    (policy,) = [a for tag, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy["content"]).startswith("default-src 'none';")


def test_a_phone_shows_it_at_its_own_width(params: Params) -> None:
    read = Reader(render(params, {"a": result()}, {}))
    (viewport,) = [a["content"] for tag, a in read.tags if a.get("name") == "viewport"]
    assert viewport == "width=device-width, initial-scale=1"
    classes = [attributes.get("class") for _, attributes in read.tags]
    tables = [tag for tag, _ in read.tags].count("table")
    assert classes.count("scroll") == tables == 3  # a wide table scrolls, the page does not
    assert "img { max-width: 100%" in read.texts["style"][0]


def test_hostile_names_and_texts_stay_text(params: Params) -> None:
    source = params.model.model_copy(update={"source": HOSTILE})
    hostile = params.model_copy(update={"model": source})
    one = result(
        verdict=Verdict(WORSE, HOSTILE, [HOSTILE]),
        scores=[{"query": HOSTILE, "original": 1.0, "quantized": 2.0}],
        queries=[ranked(HOSTILE, 1, 2, HOSTILE, HOSTILE)],
        pictures={HOSTILE: PNG},
    )
    html = render(hostile, {HOSTILE: one}, {HOSTILE: HOSTILE})
    assert "<script" not in html
    read = Reader(html)
    assert HOSTILE in read.texts["th"]  # the recipe
    assert HOSTILE in read.texts["span"]  # the breach
    # query and text of the score, text and page of the changed rank; its query is a row's head
    assert read.texts["td"].count(HOSTILE) == 2 + 2


def test_params_are_shown_whole(params: Params) -> None:
    (text,) = Reader(render(params, {"a": result()}, {})).texts["pre"]
    assert yaml.safe_load(text) == params.model_dump()


def test_equal_results_give_an_equal_report(params: Params) -> None:
    first = render(params, {"a": result()}, {})
    assert first == render(params, {"a": copy.deepcopy(result())}, {})
    assert first != render(params, {"a": result(metrics=quality(page=0.97))}, {})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params of one recipe, "x", and all that the stages write about it."""
    params = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text())
    rtn = {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True}
    params["recipes"] = {"x": rtn}
    params["release"] = {}
    params["evaluate"]["dataset"] = "data"
    params["gate"] = dict.fromkeys(params["gate"]) | {"min_page_cosine": 0.99}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report"])
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    for name, value in {
        "metrics/quality/x.json": quality(),
        "metrics/quantize/x.json": {},
        "metrics/queries/x.json": {"queries": QUERIES},
        "artifacts/heatmaps/x/index.json": [{"query": "q3", "file": "01.png"}],
        "metrics/plots/x/layers.json": LAYERS,
        "metrics/plots/x/scores.json": SCORES,
        "data/queries.jsonl": {"_id": "q1", "text": "one"},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    for name in ("metrics/plots/x/heatmap.png", "artifacts/heatmaps/x/01.png"):
        (tmp_path / name).write_bytes(PNG)
    checkpoint = tmp_path / "artifacts/checkpoints/x"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    digest = checkpoint_digest(checkpoint)
    write_json(speed_file("x", digest), {**SPEED, "checkpoint": digest})
    return tmp_path


def test_the_stage_reads_what_the_others_wrote_and_says_which_limit_broke(project: Path) -> None:
    report.main()
    read = Reader((project / "artifacts/report/index.html").read_text())
    assert {*FIGURES, *TIMES} <= set(read.texts["td"])
    assert "pages.cosine.mean 0.9812 is below gate.min_page_cosine 0.99" in read.texts["span"]


def test_timings_of_another_checkpoint_are_not_shown(project: Path) -> None:
    (project / "artifacts/checkpoints/x/config.json").write_text('{"another": 1}')
    report.main()
    cells = Reader((project / "artifacts/report/index.html").read_text()).texts["td"]
    assert not set(TIMES) & set(cells)
    assert cells.count("not measured on this machine") == 2


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
        ("metrics/quality/x.json", "evaluate@x"),
        ("metrics/quantize/x.json", "evaluate@x"),
        ("metrics/queries/x.json", "evaluate@x"),
        ("metrics/plots/x/layers.json", "evaluate@x"),
        ("metrics/plots/x/scores.json", "evaluate@x"),
        ("metrics/plots/x/heatmap.png", "heatmap@x"),
        ("artifacts/heatmaps/x/index.json", "heatmap@x"),
        ("artifacts/heatmaps/x/01.png", "heatmap@x"),
    ],
)
def test_a_missing_file_names_the_stage_that_writes_it(
    project: Path, name: str, stage: str
) -> None:
    (project / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)}: .*dvc repro {stage}"):
        report.main()


def test_missing_figures_fail_in_one_line(project: Path) -> None:
    (project / "metrics/plots/x/layers.json").write_text('[{"layer": "0.x"}]')
    with pytest.raises(UserError, match="metrics: lacks a figure"):
        report.main()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics/quality/x.json", "{}"),
        ("metrics/queries/x.json", "[]"),
        ("artifacts/heatmaps/x/index.json", "[1]"),
    ],
)
def test_files_of_another_kind_are_named(project: Path, name: str, content: str) -> None:
    (project / name).write_text(content)
    with pytest.raises(UserError, match=rf"^{re.escape(name)}: .*dvc repro"):
        report.main()
