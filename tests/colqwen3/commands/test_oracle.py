"""`colqwen3 oracle`: one verdict, exit status 1 on a fail, one line for what it cannot judge."""

import dataclasses
import json
from pathlib import Path

import pytest

from colqwen3.release import oracle as oracles
from tests.helpers.cli import execute
from tests.helpers.golden import write_golden_pages
from tests.helpers.recorded_oracle import GOLDEN, recorded
from tests.helpers.refusal import refusal


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    return write_golden_pages(tmp_path / "pages")


def test_the_original_passes_and_the_result_is_kept(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(oracles, "TOMORO_4B", recorded())
    out = tmp_path / "out.json"
    execute("oracle", "--model", GOLDEN / "model", "--pages", pages, "--out", out)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("pass: the largest difference of a score is 0.0")
    assert len(printed) == 2 * 5 + 2
    result = json.loads(out.read_text())
    assert (result["verdict"], result["quantized"], result["dtype"]) == ("pass", False, "float32")


def test_other_scores_fail_with_status_1(
    pages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = recorded()
    scores = tuple(tuple(value + 0.1 for value in row) for row in oracle.scores)
    monkeypatch.setattr(oracles, "TOMORO_4B", dataclasses.replace(oracle, scores=scores))
    with pytest.raises(SystemExit) as caught:
        execute("oracle", "--model", GOLDEN / "model", "--pages", pages)
    assert caught.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("fail: ")


def test_another_model_and_missing_pages_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(execute, "oracle", "--model", "demo/model", "--pages", tmp_path)
    assert (
        "text_config.hidden_size is 256, that of TomoroAI/tomoro-colqwen3-embed-4b is 2560" in said
    )
    monkeypatch.setattr(oracles, "TOMORO_4B", recorded())
    said = refusal(execute, "oracle", "--model", GOLDEN / "model", "--pages", tmp_path)
    assert "no such file; give the folder" in said
