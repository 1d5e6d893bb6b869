import json
import sys
from pathlib import Path

import pytest

from colqwen3.system.errors import run
from stages.checking.params import Params
from stages.pipeline.params import load_params
from stages.tools import reference
from stages.tools.results import compare_reference
from tests.helpers.metrics import write_json
from tests.helpers.results import write_project, write_results


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command"])
    write_results()
    return tmp_path


def compare() -> str:
    return compare_reference(load_params(Params))


def test_the_reference_says_of_which_machine_and_parameters_it_is(project: Path) -> None:
    assert "there is none" in compare()
    run(reference.main)
    machine = json.loads(Path("metrics/reference/machine.json").read_text())
    assert {"device", "threads", "date", "params"} == machine.keys()
    assert str(project) not in json.dumps(machine)
    for folder in ("summary", "quality", "quantize", "index"):
        for name in ("rounded", "tuned", "bad"):
            copied = Path(f"metrics/reference/{folder}/{name}.json")
            assert json.loads(copied.read_text()) == json.loads(
                Path(f"metrics/{folder}/{name}.json").read_text()
            )
    text = compare()
    assert "every figure equals the authors'" in text
    assert machine["device"] in text
    assert machine["date"] in text


def test_nothing_of_removed_recipes_stays_in_the_reference(project: Path) -> None:
    write_json(Path("metrics/reference/summary/removed.json"), {})
    run(reference.main)
    assert not Path("metrics/reference/summary/removed.json").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_timings_are_kept_where_that_is_asked_for(
    project: Path, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"tuned": {"new": 2}, "bad": {"new": 3}}
    monkeypatch.setattr(reference, "read_speed", lambda recipe, _: measured.get(recipe))
    for recipe in ("rounded", "tuned"):
        write_json(Path(f"metrics/reference/speed/{recipe}.json"), {"old": 1})
    monkeypatch.setattr(sys, "argv", ["command", *(["--keep-times"] if keep else [])])
    run(reference.main)
    folder = Path("metrics/reference/speed")
    found = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    assert found == ({"rounded": {"old": 1}, "tuned": {"old": 1}} if keep else measured)


def test_an_incomplete_result_is_no_reference(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(reference.main)
    before = Path("metrics/reference/machine.json").read_bytes()
    Path("metrics/quality/bad.json").unlink()
    with pytest.raises(SystemExit):
        run(reference.main)
    assert "metrics/quality/bad.json: cannot be read" in capsys.readouterr().err
    assert Path("metrics/reference/machine.json").read_bytes() == before
