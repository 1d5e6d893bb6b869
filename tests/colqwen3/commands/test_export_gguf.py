"""`colqwen3 export-gguf` writes a folder that runs by itself, and spoils no folder of yours."""

from pathlib import Path

import pytest

from tests.helpers.cli import error_line, execute, run_command
from tests.helpers.refusal import refusal

pytest.importorskip("gguf")
DEMO = Path("demo/model")


def test_files_are_written_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "gguf"
    execute("export-gguf", DEMO, "--out", out, "--max-num-visual-tokens", "64")
    names = ["mmproj.gguf", "run_gguf.py", "text.gguf"]
    assert sorted(path.name for path in out.iterdir()) == names
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{out / name}: {(out / name).stat().st_size:,} bytes" for name in names]
    runner = pytest.importorskip("colqwen3.gguf.run_gguf", exc_type=ImportError)
    assert runner.Embedder(out, 1).max_pixels == 64 * 32 * 32


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    said = refusal(execute, "export-gguf", DEMO, "--out", tmp_path)
    assert said == f"{tmp_path}: exists and is not an empty folder; give --out a new one"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    said = refusal(execute, "export-gguf", DEMO, "--out", tmp_path / "mine.txt")
    assert "is not an empty folder" in said


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    done = run_command("export-gguf", "tests/golden/model", "--out", tmp_path / "out")
    assert "mrope_section is [13, 1, 2], which llama.cpp rotates otherwise" in error_line(done)
    assert not (tmp_path / "out").exists()


def test_a_page_gets_at_least_the_tokens_that_it_can_be_shrunk_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        execute("export-gguf", DEMO, "--out", tmp_path / "out", "--max-num-visual-tokens", "3")
    assert "3 is less than 4" in capsys.readouterr().err
