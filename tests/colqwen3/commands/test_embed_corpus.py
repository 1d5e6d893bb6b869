"""`colqwen3 embed-corpus`: shards from folders and PDFs, one line and a status for what is wrong."""

import json
from pathlib import Path

import pytest
from PIL import Image

from colqwen3.commands.embed_corpus import find_part
from colqwen3.corpus.job import Part
from colqwen3.corpus.shards import read_vectors
from colqwen3.system.errors import UserError
from tests.helpers.cli import error_line, execute, run_command

MODEL = Path("tests/golden/model")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    sheets = [Image.linear_gradient("L").rotate(90 * turn).convert("RGB") for turn in range(3)]
    sheets[0].save(folder / "m.pdf", save_all=True, append_images=sheets[1:], resolution=100)
    sheets[1].save(folder / "a.png")
    return folder


def test_command_embeds_what_it_can_and_says_what_it_could_not(scans: Path, tmp_path: Path) -> None:
    (scans / "b.png").write_bytes(b"none")
    words: list[str | Path] = ["--model", MODEL, scans, "--max-num-visual-tokens", "16", "--out"]
    done = run_command("embed-corpus", *words, tmp_path / "out", "--workers", "1")
    assert error_line(done).endswith(
        "_errors.jsonl: 1 of 5 pages could not be embedded; replace them and run the command again"
    )
    assert "pages: 5 of 5" in done.stderr
    stored = dict(read_vectors(tmp_path / "out"))
    assert [Path(key).name for key in stored] == ["a.png", *(f"m.pdf#page={n}" for n in (1, 2, 3))]
    assert stored[str(scans / "a.png")].values.dtype == "float16"
    (entry,) = map(json.loads, (tmp_path / "out/_errors.jsonl").read_text().splitlines())
    assert "b.png: is not a PNG or JPEG image" in entry["reason"]
    with pytest.raises(UserError, match=r"b\.png"):
        execute("embed-corpus", *words, tmp_path / "strict", "--strict")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "int4"], "invalid choice"),
        (["--pages-per-shard", "0"], "above 0"),
        (["--pages-per-shard", "5000"], "more than 4096"),
        (["--workers", "-1"], "from 0 to 256"),
        (["--actors", "2"], "--actors is for --engine ray"),
    ],
)
def test_arguments_out_of_range_are_rejected(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        execute("embed-corpus", "--model", MODEL, "scans", "--out", tmp_path / "out", *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file/vectors"
    with pytest.raises(UserError) as caught:
        execute("embed-corpus", "--model", MODEL, scans, "--out", out)
    assert str(caught.value).startswith(f"{out}: cannot be made (Not a directory); give --out a ")


def test_a_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert find_part() == Part(0, 1, 0, 1)
    for name, value in zip(names, "5812", strict=True):
        monkeypatch.setenv(name, value)
    assert find_part() == Part(5, 8, 1, 2)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="start with `accelerate launch`"):
        find_part()
