"""`colqwen3 export-colpali` writes a folder, and spoils none of yours."""

from pathlib import Path

import pytest

from tests.helpers.cli import execute
from tests.helpers.refusal import refusal
from tests.helpers.widened import widen


def test_files_are_written_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "colpali"
    execute("export-colpali", widen(Path("demo/model"), tmp_path / "wide"), "--out", out)
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
    } <= names
    assert not [name for name in names if name.endswith(".py")]
    assert f"{out / 'model.safetensors'}: " in capsys.readouterr().out


def test_a_folder_in_use_is_left_alone_and_a_failure_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    said = refusal(execute, "export-colpali", Path("demo/model"), "--out", tmp_path)
    assert said == f"{tmp_path}: exists and is not an empty folder; give --out a new one"
    said = refusal(execute, "export-colpali", Path("demo/model"), "--out", tmp_path / "out")
    assert "vectors have 128 numbers" in said
    assert not (tmp_path / "out").exists()
