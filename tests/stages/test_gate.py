import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from colqwen3.system.errors import run
from stages import gate
from stages.evaluation.limits import NO_LOSS, WORSE, GateParams, find_breaches
from stages.pipeline.params import PARAMS_FILE
from stages.quantization.recipes import GptqRecipe, RtnRecipe
from tests.helpers.metrics import quality, write_json

Check = Callable[..., None]
OFF: dict[str, Any] = dict.fromkeys(GateParams.model_fields)


def figures(
    query: Any = 0.99,
    page: float = 0.98,
    difference: float = -0.01,
    margin: float = -0.1,
    changed: float = 0.02,
    layers: int = 0,
    size: int = 1000,
    nonfinite: tuple[int, int] = (0, 0),
    **changes: Any,
) -> dict[str, Any]:
    metrics = quality(query, page, nonfinite=nonfinite, **changes)
    for name, value in {"ndcg_at_5": difference, "margin": margin}.items():
        metrics["retrieval"][name].update(difference=value, low=value - 0.1, high=value + 0.2)
    metrics["retrieval"]["first_pages"]["changed_share"] = changed
    metrics["quantization"]["layers_worse_than_rounding"] = layers
    metrics["size"]["files"]["quantized"] = size
    return metrics


def limits(**given: Any) -> GateParams:
    return GateParams(**{**OFF, **given})


@pytest.mark.parametrize(
    ("limit", "within", "broken"),
    [
        ({"min_query_cosine": 0.95}, {"query": 0.95}, {"query": 0.94999999}),
        ({"min_page_cosine": 0.95}, {"page": 0.95}, {"page": 0.94999999}),
        ({"max_ndcg_at_5_drop": 0.05}, {"difference": -0.05}, {"difference": -0.05000001}),
        ({"max_ndcg_at_5_drop": 0.0}, {"difference": 0.2}, {"difference": -1e-8}),
        ({"max_bytes": 1000}, {"size": 1000}, {"size": 1001}),
        ({"max_margin_drop": 0.25}, {"margin": -0.25}, {"margin": -0.25001}),
        ({"max_margin_drop": 0.0}, {"margin": 0.1}, {"margin": float("nan")}),
        ({"max_changed_first_pages": 0.05}, {"changed": 0.05}, {"changed": 0.05001}),
        ({"max_layers_worse_than_rounding": 2}, {"layers": 2}, {"layers": 3}),
        ({"min_query_cosine": -1.0}, {"nonfinite": (0, 7)}, {"nonfinite": (1, 0)}),
        ({"min_page_cosine": -1.0}, {"nonfinite": (7, 0)}, {"nonfinite": (0, 1)}),
        ({"min_query_cosine": 0.0}, {}, {"query": float("nan")}),
        ({"max_ndcg_at_5_drop": 1.0}, {}, {"difference": float("nan")}),
    ],
)
def test_each_limit_on_both_sides(
    limit: dict[str, float], within: dict[str, Any], broken: dict[str, Any]
) -> None:
    assert find_breaches(figures(**within), limits(**limit)) == []
    (line,) = find_breaches(figures(**broken), limits(**limit))
    ((key, value),) = limit.items()
    assert f"gate.{key} {value}" in line


def test_a_breach_gives_its_figure() -> None:
    gate_params = limits(min_query_cosine=0.9, max_ndcg_at_5_drop=0.05, max_bytes=10)
    lines = find_breaches(figures(query=0.8125, difference=-0.25), gate_params)
    assert lines == [
        "queries.cosine.mean 0.8125 is below gate.min_query_cosine 0.9",
        "drop of ndcg_at_5 0.25 is above gate.max_ndcg_at_5_drop 0.05",
        "size.files.quantized 1000 is above gate.max_bytes 10",
    ]


def test_null_switches_a_limit_off() -> None:
    awful = figures(query=-1, page=-1, difference=-1, size=10**12, nonfinite=(9, 9))
    assert find_breaches(awful, limits()) == []


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Return a function that writes params.yaml and metrics, and runs the stage on recipe "x"."""
    params = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gate", "x"])
    recipe = {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True}

    def check(
        limits: dict[str, float], metrics: Any, even_if_worse: bool = False, other: Any = recipe
    ) -> None:
        params.update(
            gate={**OFF, **limits},
            recipes={"x": recipe, "other": other},
            release={"x": {"even_if_worse": even_if_worse}},
            fallbacks={"x": "other"},
        )
        with open("params.yaml", "w") as file:
            YAML(typ="safe", pure=True).dump(params, file)
        if metrics is not None:
            write_json(tmp_path / "metrics/quality/x.json", metrics)
        if not Path("metrics/quantize/x.json").exists():
            write_json(tmp_path / "metrics/quantize/x.json", {"recipe": {"ran": "x"}})
        run(gate.main)

    return check


def test_the_stage_lists_every_breach_and_writes_nothing(
    project: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"min_query_cosine": 0.9, "min_page_cosine": 0.9, "max_bytes": 1000}
    with pytest.raises(SystemExit) as caught:
        project(limits, figures(query=0.5, size=1001))
    assert caught.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors[:2] == [
        "error: metrics/quality/x.json: queries.cosine.mean 0.5 is below gate.min_query_cosine 0.9",
        "error: metrics/quality/x.json: size.files.quantized 1001 is above gate.max_bytes 1000",
    ]
    assert "x is not released" in errors[2]
    assert "release.x.even_if_worse: true" in errors[2]
    assert not Path("artifacts/gate/x.json").exists()


def test_another_recipe_is_not_looked_at(project: Check) -> None:
    write_json(Path("metrics/quality/other.json"), figures(query=0.1))
    project({"min_query_cosine": 0.9}, figures())
    assert json.loads(Path("artifacts/gate/x.json").read_text())["recipe"] == "x"


def test_the_stage_passes_within_the_limits(
    project: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    project({"min_query_cosine": 0.9, "max_bytes": 1000}, figures())
    assert "error" not in capsys.readouterr().err
    verdict = json.loads(Path("artifacts/gate/x.json").read_text())
    assert (verdict["verdict"], verdict["breaches"]) == (NO_LOSS, [])


def test_a_recipe_that_is_released_even_if_worse_passes_with_its_verdict(project: Check) -> None:
    project({"min_query_cosine": 0.9}, figures(query=0.5), even_if_worse=True)
    verdict = json.loads(Path("artifacts/gate/x.json").read_text())
    assert verdict["verdict"] == WORSE
    assert verdict["breaches"] == [
        "queries.cosine.mean 0.5 is below gate.min_query_cosine 0.9",
    ]


def test_few_queries_are_warned_of(project: Check, caplog: pytest.LogCaptureFixture) -> None:
    project({}, figures(queries=100))
    assert "are few" not in caplog.text
    project({}, figures(queries=99))
    assert "99 queries are few; give 100 or more" in caplog.text


@pytest.mark.parametrize("metrics", [None, {}, {"queries": None}, [], figures(query="0.99")])
def test_metrics_that_lack_a_figure_fail_in_one_line(
    project: Check, capsys: pytest.CaptureFixture[str], metrics: Any
) -> None:
    with pytest.raises(SystemExit) as caught:
        project({"min_query_cosine": 0.9}, metrics)
    assert caught.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: metrics/quality/x.json: ")
    assert "dvc repro evaluate@x" in line


def test_a_fallback_is_warned_of_and_must_be_the_current_one(
    project: Check, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    values = RtnRecipe(
        method="rtn", calibration="none", bits=4, group_size=128, sym=True
    ).model_dump()
    record = {"ran": "other", "instead_of": "x", "because": "no memory", "values": values}
    path = Path("metrics/quantize/x.json")
    write_json(path, {"recipe": record})
    project({}, figures())
    assert "recipe x failed (no memory); other ran instead" in caplog.text
    write_json(path, {"recipe": {**record, "values": {**values, "bits": 8}}})
    with pytest.raises(SystemExit):
        project({}, figures())
    assert "is of the fallback other, which changed since; run `dvc repro -f quantize@x`" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("ran", "now", "passes"),
    [
        ({"steps": 5}, {"steps": 5, "codes_lr": 0.003}, True),  # the default
        ({"steps": 5}, {"steps": 6}, False),
        ({"steps": 5}, {"steps": 5, "codes_lr": 0}, False),
        ({"steps": 5}, None, False),
        (None, {"steps": 5}, False),
    ],
)
def test_a_fallback_whose_end_to_end_tuning_changed_is_not_the_one_that_ran(
    project: Check, capsys: pytest.CaptureFixture[str], ran: Any, now: Any, passes: bool
) -> None:
    """It is in no parameter that DVC knows of the recipe that it ran instead of."""
    weights = {"bits": 4, "group_size": 128, "sym": True}
    values = {"method": "gptq", "calibration": "mixed", **weights, "end_to_end": ran}
    dumped = GptqRecipe.model_validate(values).model_dump()
    record = {"ran": "other", "instead_of": "x", "because": "no memory", "values": dumped}
    write_json(Path("metrics/quantize/x.json"), {"recipe": record})
    with contextlib.nullcontext() if passes else pytest.raises(SystemExit):
        project({}, figures(), other={**values, "end_to_end": now})
    assert Path("artifacts/gate/x.json").exists() == passes
    assert ("is of the fallback other, which changed since" in capsys.readouterr().err) != passes
