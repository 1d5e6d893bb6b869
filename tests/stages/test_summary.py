import json
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from colqwen3.system.errors import UserError
from stages import summary
from stages.evaluation.summary import summarize
from stages.pipeline.params import PARAMS_FILE
from tests.helpers.metrics import GATE, SMALL


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
        path.write_text(json.dumps(summarize(SMALL, GATE)))
    return tmp_path


def test_the_stage_plots_the_recipes_of_params_and_no_other(project: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: cannot be read .*`dvc repro evaluate@a`"):
        summary.main()
    (project / "metrics/summary/a.json").write_text(json.dumps(summarize(SMALL, GATE)))
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
