"""The study of 8-bit activations on the golden model."""

import json
import sys
from pathlib import Path

import pytest

from colqwen3.system.errors import run
from demo.studies import activations
from tests.helpers.golden import STEMS, golden_page

MODEL = Path("tests/golden/model")


@pytest.fixture
def page_set(tmp_path: Path) -> Path:
    folder = tmp_path / "pages"
    (folder / "corpus").mkdir(parents=True)
    golden_page(STEMS[0]).save(folder / "corpus/a.png")
    lines = [json.dumps({"_id": str(number), "text": "a total"}) for number in range(8)]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_both_activations_are_measured(
    page_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    words = ["--original", str(MODEL), "--checkpoint", f"itself={MODEL}"]
    words += ["--page-sets", str(page_set), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["activations", *words])
    run(activations.main)
    losses = json.loads(out.read_text())["loss"]["itself"]
    for kind in ("pages", "queries"):
        assert abs(losses["bfloat16"]["pages"][kind]) < 1e-6  # the runtime is transformers
        assert 1e-6 < losses["int8"]["pages"][kind] < 0.01


def test_a_missing_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--original", str(tmp_path), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["activations", *words])
    with pytest.raises(SystemExit) as caught:
        run(activations.main)
    assert caught.value.code == 1
    assert "is no model folder" in capsys.readouterr().err
