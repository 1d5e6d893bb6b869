"""`colqwen3 embed` writes the golden embeddings, and refuses what it cannot embed in one line."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from colqwen3.commands.embed import ACTIVATIONS
from colqwen3.embedding.store import read_embeddings
from colqwen3.system.device import ActivationsKind
from tests.helpers.cli import error_line, execute, run_command
from tests.helpers.golden import STEMS, write_golden_pages

GOLDEN = Path("tests/golden")
META = json.loads((GOLDEN / "golden_meta.json").read_text())
EMBEDDINGS = load_file(GOLDEN / "golden.safetensors")


def test_activations_are_those_of_the_runtime() -> None:
    assert get_args(ActivationsKind) == ACTIVATIONS


def test_command_gives_the_golden_embeddings(queries: Path, tmp_path: Path) -> None:
    pages, out = write_golden_pages(tmp_path / "pages"), tmp_path / "new" / "out.safetensors"
    done = run_command(
        "embed", "--model", GOLDEN / "model", "--queries", queries, "--pages", pages,
        "--out", out, "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored_vectors = load_file(out)
    names = [json.loads(line)["_id"] for line in queries.read_text().splitlines()]
    stems = STEMS
    assert stored_vectors.keys() == {f"query/{n}" for n in names} | {f"page/{s}" for s in stems}
    for key, vectors in stored_vectors.items():
        kind, name = key.split("/")
        rows = META["pages"][name].get("rows") if kind == "page" else None
        remaining = vectors if rows is None else vectors[rows]
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(remaining, EMBEDDINGS[key], atol=1e-5, rtol=0)
    stored = read_embeddings(out)
    assert (list(stored.queries), list(stored.pages)) == (names, stems)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "no/such/folder"], "no such folder"),
        (["--model", "tests"], "config.json: cannot be read"),
        (["--model", "tests/golden/model", "--queries", "no.jsonl"], "no.jsonl"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, queries: Path, tmp_path: Path
) -> None:
    if "--queries" not in args:
        args = [*args, "--queries", str(queries)]
    done = run_command("embed", *args, "--out", tmp_path / "out.safetensors")
    assert message in error_line(done)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--pages", "p", "--out", "p.png"], "must name a file that ends in .safetensors"),
        (["--out", "p.safetensors"], "give at least one of --queries and --pages"),
        (["--pages", "p"], "required: --out"),
        (
            ["original", "--pages", "p", "--out", "p.safetensors"],
            "unrecognized arguments: original",
        ),
        (["--pages", "p", "--out", "p.safetensors", "--queries-per-batch", "0"], "above 0"),
    ],
)
def test_arguments_that_contradict_are_refused(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        execute("embed", "--model", GOLDEN / "model", *args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_page_gets_at_least_the_tokens_of_one_patch_group(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        execute("embed", "--model", "tests/golden/model", "--max-num-visual-tokens", "3")
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("argument --max-num-visual-tokens: 3 is less than 4")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_are_of_the_dtype_asked_for(
    queries: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    words: list[str | Path] = ["--model", GOLDEN / "model", "--queries", queries, "--out"]
    execute("embed", *words, tmp_path / "wide.safetensors")
    execute("embed", *words, tmp_path / "out.safetensors", "--output-dtype", name)
    wide, stored = (load_file(tmp_path / f"{name}.safetensors") for name in ("wide", "out"))
    assert all(torch.equal(stored[key], wide[key].to(dtype)) for key in wide)
