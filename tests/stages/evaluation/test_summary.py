import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from colqwen3.system.errors import UserError
from stages import summary
from stages.evaluation.limits import GateParams
from stages.evaluation.summary import loss_bars, ndcg_bars, rank_bars, summarize
from stages.pipeline.params import PARAMS_FILE

METRICS: dict[str, Any] = {
    "data": {"queries": 6},
    "overlap": {"same_folder": False, "pages": 0, "queries": 0},
    "pages": {"cosine": {"mean": 0.987654, "p01": 0.1, "min": 0.0}, "nonfinite": 0},
    "queries": {"cosine": {"mean": 0.9, "p01": 0.1, "min": 0.0}, "grade": "GOOD", "nonfinite": 0},
    "retrieval": {
        "ndcg_at_5": {"original": 0.75, "quantized": 0.5, "difference": -0.25},
        "recall_at_1": {"original": 0.6, "quantized": 0.4},
        "margin": {"original": 3.0, "quantized": 2.0},
        "top1_agreement": 0.33333,
        "first_pages": {
            "changed": 4,
            "changed_share": 0.66667,
            "ranked_lower": 3,
            "ranked_higher": 1,
        },
    },
    "mixed_index": {"ndcg_at_5": {"original": 0.75, "quantized": 0.625}},
    "size": {"files": {"original": 4_000_000, "quantized": 1_250_000}},
}


GATE = GateParams(
    min_query_cosine=None, min_page_cosine=None, max_ndcg_at_5_drop=0.05, max_bytes=None
)


def test_each_figure_is_the_one_it_is_called() -> None:
    assert summarize(METRICS, GATE) == {
        "cos_page": 0.987654,
        "cos_query": 0.9,
        "higher": 1,
        "lower": 3,
        "mb": 1.25,
        "ndcg5": 0.5,
        "ndcg5_mixed": 0.625,
        "ndcg5_orig": 0.75,
        "recall1": 0.4,
        "top1_same": 0.33333,
        "verdict": "worse",  # 0.25 of nDCG@5 lost, 0.05 are allowed
    }


def test_a_row_is_flat_and_of_one_type_a_key() -> None:
    whole = json.loads(json.dumps(METRICS).replace("0.75", "1").replace("0.5", "0"))
    row = summarize(whole, GATE)
    assert {key: type(value) for key, value in row.items()} == {
        key: type(value) for key, value in summarize(METRICS, GATE).items()
    }


def test_missing_figures_are_no_zeros() -> None:
    with pytest.raises(KeyError):
        summarize({**METRICS, "mixed_index": {}}, GATE)


def test_bars_keep_the_order_of_recipes() -> None:
    bars = ndcg_bars({"b": summarize(METRICS, GATE), "a": summarize(METRICS, GATE)})
    assert [bar["bar"] for bar in bars] == [
        "b: original", "b: quantized", "b: mixed index",
        "a: original", "a: quantized", "a: mixed index",
    ]  # fmt: skip
    assert [bar["ndcg_at_5"] for bar in bars[:3]] == [0.75, 0.5, 0.625]


def test_losses_and_ranks_tell_recipes_apart() -> None:
    rows = {"b": summarize(METRICS, GATE)}
    assert [(bar["bar"], bar["loss"]) for bar in loss_bars(rows)] == [
        ("b: pages", 0.012346),
        ("b: queries", 0.1),
    ]
    assert [(bar["bar"], bar["queries"]) for bar in rank_bars(rows)] == [
        ("b: lower", 3),
        ("b: higher", 1),
    ]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params of the recipes "a" and "b", and summaries of "b" and a removed one."""
    params = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text())
    recipe = {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True}
    params["recipes"] = {"b": recipe, "a": recipe}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["summary"])
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    (tmp_path / "metrics/summary").mkdir(parents=True)
    for name in ("b", "removed"):
        path = tmp_path / f"metrics/summary/{name}.json"
        path.write_text(json.dumps(summarize(METRICS, GATE)))
    return tmp_path


def test_the_stage_plots_the_recipes_of_params_and_no_other(project: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: cannot be read .*`dvc repro evaluate@a`"):
        summary.main()
    (project / "metrics/summary/a.json").write_text(json.dumps(summarize(METRICS, GATE)))
    summary.main()
    bars = json.loads((project / "metrics/plots/ndcg.json").read_text())
    assert [bar["recipe"] for bar in bars] == ["a", "a", "a", "b", "b", "b"]
    for name in ("loss", "ranks"):
        bars = json.loads((project / f"metrics/plots/{name}.json").read_text())
        assert [bar["recipe"] for bar in bars] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("text", ["{}", "[]", "null"])
def test_a_summary_that_lacks_a_figure_fails_in_one_line(project: Path, text: str) -> None:
    (project / "metrics/summary/a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: lacks a figure"):
        summary.main()
