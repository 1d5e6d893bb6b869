import json
import re
import sys
from pathlib import Path

import pytest

from colqwen3.system.errors import UserError, run
from stages.checking.params import Params
from stages.pipeline.params import load_params
from stages.tools import reference, results
from stages.tools.results import align, compare_reference, describe, find_moved
from tests.helpers.metrics import contrast, quality, write_json
from tests.helpers.results import write_project, write_result, write_results


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command"])
    write_results()
    return tmp_path


def say() -> str:
    return "\n".join(describe(load_params(Params)))


def test_each_recipe_has_its_row(project: Path) -> None:
    rows = say().splitlines()[:4]
    assert rows[0].split("  ")[0] == "recipe"
    for row, parts in zip(
        rows[1:],
        (
            ("bad", "worse", "5.0 MB", "0.500000", "0.026600", "66 of 252"),
            ("rounded", "no measurable loss", "7.3 MB", "0.010000", "0.026600", "66 of 252"),
            ("tuned", "no measurable loss", "7.3 MB", "0.000235", "0.026600", "66 of 252"),
        ),
        strict=True,
    ):
        assert re.split(r" {2,}", row) == list(parts)


def test_columns_are_aligned() -> None:
    assert align([("a", "b", "c"), ("long", "x", "1000")]) == [
        "a     b     c",
        "long  x  1000",
    ]


def test_the_smallest_recipe_within_the_limits_is_named(project: Path) -> None:
    # "bad" is smaller, but breaks a limit; of equal sizes the one that lost less is taken
    assert "Smallest recipe within the limits: tuned (7,304,168 bytes)." in say()
    write_result("tuned", quality(page=0.5))
    write_result("rounded", quality(page=0.5))
    assert "No recipe is within the limits." in say()
    assert "Next:     change a recipe or a limit in params.yaml" in say()


def test_it_says_where_things_are_and_what_is_next(project: Path) -> None:
    assert "Report:   artifacts/report/index.html (`make report` writes it)" in say()
    assert "Released: nothing" in say()
    for name in ("tuned", "bad"):  # the latter of an earlier run
        Path(f"artifacts/release/{name}").mkdir(parents=True)
    Path("artifacts/report").mkdir()
    Path("artifacts/report/index.html").touch()
    text = say()
    assert "Report:   artifacts/report/index.html\n" in text
    assert "Released: artifacts/release/tuned\n" in text
    assert "Next:     python -m stages.tools.upload artifacts/release/tuned OWNER/NAME" in text


def test_a_recipe_that_was_not_evaluated_is_told(project: Path) -> None:
    Path("metrics/quality/tuned.json").unlink()
    assert "Not evaluated: tuned." in say()
    Path("metrics/quality/rounded.json").write_text("{}")
    with pytest.raises(UserError, match=r"quality/rounded\.json: lacks a figure"):
        say()


def compare() -> str:
    return compare_reference(load_params(Params))


def move(recipe: str, key: str, by: float) -> None:
    path = Path(f"metrics/summary/{recipe}.json")
    summary = json.loads(path.read_text())
    write_json(path, {**summary, key: round(summary[key] + by, 6)})


@pytest.mark.parametrize(
    ("recipe", "key", "by", "how_far"),
    [
        ("tuned", "cos_page", 1e-5, "within"),
        ("tuned", "cos_page", -1.1e-5, "beyond"),
        ("tuned", "ndcg5", -0.0015, "within"),
        ("tuned", "ndcg5", 0.00151, "beyond"),
        ("tuned", "mb", 0.00001, "beyond"),
        ("rounded", "cos_page", 1e-6, "within"),
        ("rounded", "cos_page", 1e-5, "beyond"),
        ("rounded", "ndcg5", 0.0015, "beyond"),
    ],
)
def test_what_moved_is_weighed_against_what_a_cpu_changes(
    project: Path, recipe: str, key: str, by: float, how_far: str
) -> None:
    run(reference.main)
    before = json.loads(Path(f"metrics/summary/{recipe}.json").read_text())[key]
    move(recipe, key, by)
    text = compare()
    assert f"moved {how_far} what another kind of CPU changes" in text
    assert f"{recipe} {key} {before} → {round(before + by, 6)}" in text
    assert "\n" not in text


def test_another_verdict_is_beyond(project: Path) -> None:
    row = {"verdict": "no measurable loss"}
    assert find_moved(row, {"verdict": "worse"}, True) == (
        ["verdict worse → no measurable loss"], False,
    )  # fmt: skip
    assert find_moved({}, {"ndcg5": 1.0}, True) == (["ndcg5 1.0 → None"], False)


def test_other_parameters_are_not_compared(project: Path) -> None:
    run(reference.main)
    path = Path("metrics/reference/machine.json")
    machine = json.loads(path.read_text())
    changed = json.loads(path.read_text())
    changed["params"]["recipes"]["tuned"]["bits"] = 3
    write_json(path, changed)
    move("tuned", "ndcg5", 0.4)  # of another recipe: says nothing
    assert "every figure equals" in compare()
    machine["params"]["evaluate"]["dataset"] = "another"
    write_json(path, machine)
    assert "have other parameters, so they are not compared" in compare()
    write_json(path, {})
    with pytest.raises(UserError, match=r"machine\.json: lacks 'params'"):
        compare()


def test_the_command_ends_well_whatever_the_verdict(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result("tuned", quality(page=0.5, ndcg=contrast(0.9, 0.1, -0.9, -0.7)))
    run(results.main)
    assert "worse" in capsys.readouterr().out


def test_results_of_earlier_parameters_are_named_and_not_shown(project: Path) -> None:
    path = Path("metrics/quantize/tuned.json")
    record = json.loads(path.read_text())
    record["recipe"]["values"]["iters"] = 5
    write_json(path, record)
    text = say()
    assert "Results of earlier parameters, not shown: tuned." in text
    assert not any(line.startswith("tuned ") for line in text.splitlines())
    assert "Smallest recipe within the limits: rounded" in text


def test_a_fallback_is_shown_by_its_name(project: Path) -> None:
    path = Path("metrics/quantize/tuned.json")
    record = json.loads(path.read_text())
    record["recipe"] = json.loads(Path("metrics/quantize/rounded.json").read_text())["recipe"]
    write_json(path, record)
    assert any(line.startswith("tuned (by rounded) ") for line in say().splitlines())
