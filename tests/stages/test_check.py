"""Everything that the check stage notices before another stage touches a result."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colqwen3.system.errors import UserError
from stages import check
from stages.checking.params import Params
from stages.pipeline.params import load_params
from tests.helpers.work import make_work, write_params

Change = Callable[[Path, dict[str, Any]], object]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_work(tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["check"])
    return folder


def change(folder: Path, edit: Change) -> None:
    values = load_params(Params, folder / "params.yaml").model_dump()
    edit(folder, values)
    write_params(folder, values)


def test_sound_input_passes_and_the_out_never_changes(work: Path) -> None:
    check.main()
    first = (work / "artifacts/checked.json").read_bytes()
    change(work, lambda _, values: values["gate"].update(min_page_cosine=0.5))
    check.main()
    assert (work / "artifacts/checked.json").read_bytes() == first


CASES: list[tuple[Change, str]] = [
    (
        lambda _, v: v["evaluate"].update(dataset="nowhere"),
        "params.yaml: evaluate.dataset: there is no folder nowhere",
    ),
    (
        lambda _, v: v["calibration"].update(dataset="nowhere"),
        "params.yaml: calibration.dataset: there is no folder nowhere",
    ),
    (
        lambda _, v: v["calibration"]["sets"]["some"].update(pages=3),
        "params.yaml: calibration.sets.some.pages is 3, but data/corpus has 2",
    ),
    (
        lambda _, v: v["calibration"]["sets"]["some"].update(queries=9),
        "params.yaml: calibration.sets.some.queries is 9, but data/queries.jsonl has 2",
    ),
    (
        lambda _, v: v["calibration"]["sets"]["some"].update(passages=1),
        "data/texts.jsonl: cannot be read",
    ),
    (lambda f, _: (f / "data/qrels.tsv").unlink(), "data/qrels.tsv: cannot be read"),
    (lambda f, _: (f / "data/qrels.tsv").write_text("query\n"), "data/qrels.tsv: line 1"),
    (lambda f, _: shutil.rmtree(f / "data/corpus"), "data/corpus: cannot be read"),
    (lambda f, _: (f / "model/config.json").write_text("{}"), "model/config.json: model_type"),
    (
        lambda f, _: (f / "model/config.json").rename(f / "model/adapter_config.json"),
        "model/adapter_config.json",
    ),
]


@pytest.mark.parametrize(("edit", "start"), CASES, ids=[start for _, start in CASES])
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    work: Path, edit: Change, start: str
) -> None:
    change(work, edit)
    with pytest.raises(UserError) as caught:
        check.main()
    message = str(caught.value)
    assert message.startswith(start)
    assert "\n" not in message and "; " in message
    assert not (work / "artifacts/checked.json").exists()


def test_a_group_size_that_does_not_divide_is_found_before_quantizing(work: Path) -> None:
    path = work / "model/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["intermediate_size"] = 192
    path.write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"recipes\.rtn\.group_size is 128.*192 inputs of vlm.*down"
    ):
        check.main()


def test_a_group_size_that_does_not_fit_the_vision_tower_is_found_too(work: Path) -> None:
    change(work, lambda _, values: values["recipes"]["rtn"].update(vision={"mlp": 8}))
    with pytest.raises(
        UserError, match=r"rtn\.group_size is 128.* 36 inputs of .*visual.*linear_fc1"
    ):
        check.main()


def test_a_link_in_place_of_the_results_folder_is_rejected(work: Path) -> None:
    (work / "elsewhere").mkdir()
    os.symlink(work / "elsewhere", work / "artifacts")
    with pytest.raises(UserError, match=r"artifacts: is a symbolic link.*dvc cache dir"):
        check.main()


def test_names_that_contradict_their_recipe_are_told(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def rename(_: Path, values: dict[str, Any]) -> None:
        values["recipes"]["rtn-w4g32"] = values["recipes"].pop("rtn")
        values["recipes"]["w4g128-new"] = values["recipes"].pop("tuned")
        budget = {**values["recipes"]["rtn-w4g32"], "bytes": 5e6}
        values["recipes"]["rtn-w3g128"] = {k: v for k, v in budget.items() if k != "bits"}
        values["sensitivity"].update(
            calibration=next(iter(values["calibration"]["sets"])), group_size=128
        )

    change(work, rename)
    check.main()
    assert "recipes.rtn-w3g128 has a budget of bytes and group size 128" in caplog.text
    assert "recipes.rtn-w4g32 has 4 bits and group size 128" in caplog.text
    assert "w4g128-new" not in caplog.text


def test_calibrating_on_what_is_evaluated_is_told(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check.main()  # `make_work` uses one folder for both
    assert "calibration.dataset and evaluate.dataset are the same folder" in caplog.text
    caplog.clear()
    shutil.copytree(work / "data", work / "other")
    change(work, lambda _, values: values["calibration"].update(dataset="other"))
    check.main()
    assert "same folder" not in caplog.text


def test_a_set_with_too_few_of_a_kind_is_told_and_the_check_passes(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check.main()  # `make_work` tunes on a handful of samples
    assert "calibration.sets.some.pages is 1, fewer than" in caplog.text
    assert (work / "artifacts/checked.json").exists()
    caplog.clear()
    change(work, lambda _, values: values["recipes"].pop("tuned"))
    check.main()
    assert "calibration.sets.some" not in caplog.text
