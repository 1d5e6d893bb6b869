import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from colqwen3.system.errors import run
from stages import gate
from stages.evaluation.limits import GateParams, find_breaches
from stages.pipeline.params import PARAMS_FILE
from stages.quantization.recipes import RtnRecipe

Check = Callable[[dict[str, float], dict[str, Any]], None]
OFF = {
    "min_query_cosine": None,
    "min_page_cosine": None,
    "max_ndcg_at_5_drop": None,
    "max_bytes": None,
}


def made_up(
    query: Any = 0.99,
    page: float = 0.98,
    difference: float = -0.01,
    size: int = 1000,
    nonfinite: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
    return {
        "queries": {"cosine": {"mean": query}, "nonfinite": nonfinite[0]},
        "pages": {"cosine": {"mean": page}, "nonfinite": nonfinite[1]},
        "retrieval": {"ndcg_at_5": {"difference": difference}},
        "size": {"files": {"quantized": size}},
    }


def limits(**given: Any) -> GateParams:
    return GateParams(**{**OFF, **given})


@pytest.mark.parametrize(
    ("limit", "kept", "broken"),
    [
        ({"min_query_cosine": 0.95}, {"query": 0.95}, {"query": 0.94999999}),
        ({"min_page_cosine": 0.95}, {"page": 0.95}, {"page": 0.94999999}),
        ({"max_ndcg_at_5_drop": 0.05}, {"difference": -0.05}, {"difference": -0.05000001}),
        ({"max_ndcg_at_5_drop": 0.0}, {"difference": 0.2}, {"difference": -1e-8}),
        ({"max_bytes": 1000}, {"size": 1000}, {"size": 1001}),
        ({"min_query_cosine": -1.0}, {"nonfinite": (0, 7)}, {"nonfinite": (1, 0)}),
        ({"min_page_cosine": -1.0}, {"nonfinite": (7, 0)}, {"nonfinite": (0, 1)}),
        ({"min_query_cosine": 0.0}, {}, {"query": float("nan")}),
        ({"max_ndcg_at_5_drop": 1.0}, {}, {"difference": float("nan")}),
    ],
)
def test_each_limit_on_both_sides(
    limit: dict[str, float], kept: dict[str, Any], broken: dict[str, Any]
) -> None:
    assert find_breaches(made_up(**kept), limits(**limit)) == []
    (line,) = find_breaches(made_up(**broken), limits(**limit))
    ((key, value),) = limit.items()
    assert f"gate.{key} {value}" in line


def test_a_breach_gives_its_figure() -> None:
    gate_params = limits(min_query_cosine=0.9, max_ndcg_at_5_drop=0.05, max_bytes=10)
    lines = find_breaches(made_up(query=0.8125, difference=-0.25), gate_params)
    assert lines == [
        "queries.cosine.mean 0.8125 is below gate.min_query_cosine 0.9",
        "drop of ndcg_at_5 0.25 is above gate.max_ndcg_at_5_drop 0.05",
        "size.files.quantized 1000 is above gate.max_bytes 10",
    ]


def test_null_switches_a_limit_off() -> None:
    awful = made_up(query=-1, page=-1, difference=-1, size=10**12, nonfinite=(9, 9))
    assert find_breaches(awful, limits()) == []


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Return a function that writes params.yaml and metrics, and runs the stage on them."""
    params = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gate"])
    (tmp_path / "metrics").mkdir()
    recipe = {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True}

    def check(limits: dict[str, float], metrics: dict[str, Any]) -> None:
        params.update(gate={**OFF, **limits}, recipes=dict.fromkeys(metrics, recipe))
        with open("params.yaml", "w") as file:
            YAML(typ="safe", pure=True).dump(params, file)
        for name, figures in metrics.items():
            if figures is not None:
                (tmp_path / "metrics" / f"{name}.json").write_text(json.dumps(figures))
        run(gate.main)

    return check


def test_the_stage_lists_every_breach_of_every_recipe(
    project: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"good": made_up(), "bad": made_up(query=0.5, size=11), "worse": made_up(page=0.5)}
    with pytest.raises(SystemExit) as caught:
        project({"min_query_cosine": 0.9, "min_page_cosine": 0.9, "max_bytes": 1000}, metrics)
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "error: metrics/bad.json: queries.cosine.mean 0.5 is below gate.min_query_cosine 0.9",
        "error: metrics/worse.json: pages.cosine.mean 0.5 is below gate.min_page_cosine 0.9",
    ]


def test_the_stage_passes_within_the_limits(
    project: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    project({"min_query_cosine": 0.9, "max_bytes": 1000}, {"a": made_up(), "b": made_up()})
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("figures", [None, {}, {"queries": None}, [], made_up(query="0.99")])
def test_metrics_that_lack_a_figure_fail_in_one_line(
    project: Check, capsys: pytest.CaptureFixture[str], figures: Any
) -> None:
    with pytest.raises(SystemExit) as caught:
        project({"min_query_cosine": 0.9}, {"x": figures})
    assert caught.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: metrics/x.json: ")
    assert "dvc repro evaluate@x" in line


def test_a_fallback_is_warned_of_and_must_be_the_current_one(
    project: Check, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    values = RtnRecipe(
        method="rtn", calibration="none", bits=4, group_size=128, sym=True
    ).model_dump()
    made = {"ran": "b", "instead_of": "a", "because": "no memory", "values": values}
    path = Path("metrics/quantize/a.json")
    path.parent.mkdir()
    path.write_text(json.dumps({"recipe": made}))
    project({}, {"a": made_up(), "b": made_up()})
    assert "recipe a failed (no memory); b ran instead" in caplog.text
    path.write_text(json.dumps({"recipe": {**made, "values": {**values, "bits": 8}}}))
    with pytest.raises(SystemExit):
        project({}, {"a": made_up(), "b": made_up()})
    assert "made by the fallback b, which changed since; run `dvc repro -f quantize@a`" in (
        capsys.readouterr().err
    )
