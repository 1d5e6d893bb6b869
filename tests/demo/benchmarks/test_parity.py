"""Cosines by hand, and the runtime against transformers on a CPU, where both are exact."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from colqwen3.system.errors import UserError
from demo.benchmarks import parity

DEMO = "demo/model"


def test_cosines_by_hand_leave_padding_out() -> None:
    actual = [torch.tensor([[2.0, 0.0], [0.0, 3.0], [9.0, 9.0]])]
    expected = [torch.tensor([[1.0, 0.0], [1.0, 1.0]])]
    assert parity.compare(actual, expected) == {"least": 0.707107, "mean": 0.853553}


def command(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["parity", "--out", str(out), *words])
    parity.main()


def test_results_are_added_to_those_of_the_same_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, out = tmp_path / "dataset", tmp_path / "parity.json"
    monkeypatch.setattr(parity, "QUERIES", 2)
    monkeypatch.setattr(parity, "PAGES", 1)
    (dataset / "corpus").mkdir(parents=True)
    source = Path("demo/pages/evaluation")
    shutil.copy(source / "queries.jsonl", dataset)
    shutil.copy(source / "corpus/eval-000.png", dataset / "corpus")
    for name in ("first", "second"):
        command(monkeypatch, out, "--dataset", str(dataset), f"{name}={DEMO}")
    results = json.loads(out.read_text())
    assert set(results["models"]) == {"first", "second"}
    cosine = results["models"]["second"]["cosine"]
    assert cosine["runtime, eager / transformers, sdpa"] == {
        kind: {"least": 1.0, "mean": 1.0} for kind in ("queries", "pages")
    }
    results["machine"]["cpu"] = "another"
    out.write_text(json.dumps(results))
    with pytest.raises(UserError, match="measured with another machine"):
        command(monkeypatch, out, f"first={DEMO}")


def test_a_folder_without_a_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="'demo/model' is no NAME=FOLDER"):
        command(monkeypatch, tmp_path / "parity.json", DEMO)
