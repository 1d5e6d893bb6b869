"""The measurement of collections runs on a CPU, and its figures are those of what it did."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from colqwen3.corpus.sources import find_sources
from demo.benchmarks import corpus_steps, drawn_pages, embed_corpus

MODEL = "tests/golden/model"


def test_drawn_pages_are_a4_at_150_dpi_and_differ(tmp_path: Path) -> None:
    drawn_pages.write_png(tmp_path, 1)
    drawn_pages.write_pdf(tmp_path, 2, 2)
    with Image.open(tmp_path / "page-000001.png") as page:
        assert page.size == (1240, 1754)
        assert page.convert("L").getextrema() == (0, 255)
        assert page.tobytes() != drawn_pages.draw(2).tobytes()
    assert find_sources([str(tmp_path / "scan-000002.pdf")])[-1].page == 2


def test_all_steps_run_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # processes would import all of this anew
    monkeypatch.setattr(corpus_steps, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(2))
    monkeypatch.setattr(corpus_steps, "write_png", small_png)
    monkeypatch.setattr(corpus_steps, "write_pdf", small_pdf)
    out = tmp_path / "figures.json"
    words = ["--model", MODEL, "--weights", "golden", "--out", str(out), "--pages", "5",
             "--distinct", "2", "--workers", "1", "--seconds", "0.1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["embed_corpus", *words])
    embed_corpus.main()
    figures = json.loads(out.read_text())
    assert figures["weights"] == "golden"
    steps = figures["steps"]
    assert sorted(steps) == ["again", "draw", "load", "pdf", "png", "prepare", "runtime"]
    assert not [step for step in steps.values() if "failed" in step]
    for kind in ("png", "pdf"):
        assert (steps[kind]["pages"], steps[kind]["errors"]) == (5, 0)
        assert steps[kind]["pages_per_second"] == pytest.approx(5 / steps[kind]["seconds"], rel=0.1)
        ratio = steps[kind]["pages_per_second"] / steps["runtime"]["pages_per_second"]
        assert steps[kind]["pages_per_second_to_runtime"] == pytest.approx(ratio, abs=0.0006)
        assert steps[kind]["host_memory"]["peak_gb"] > 0.1
    assert steps["again"] == {"shards": 1, "same_bytes": True}
    assert json.loads(capsys.readouterr().out) == figures


@pytest.mark.parametrize(
    ("ends", "rate"),
    [
        ([3.0, 10.0, 5.0, 20.0], 4 / 2 + 4 / 10),  # the cards take turns
        ([3.0, 10.0, 5.0], None),
        ([3.0], None),
        ([3.0, 10.0, 3.0, 20.0], None),
    ],
)
def test_the_rate_of_two_cards_is_the_sum_of_each_ones(
    ends: list[float], rate: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        out.mkdir()
        for number, end in enumerate(ends):
            path = out / f"part-{number}.parquet"
            path.touch()
            os.utime(path, (end, end))
        (out / "_manifest.json").write_text(json.dumps({"embedded": 4 * len(ends)}))
        return subprocess.CompletedProcess([], 0, "", "WARNING: slow\nINFO: fine\n")

    monkeypatch.setattr(subprocess, "run", run)
    figures = corpus_steps.launched(tmp_path, tmp_path, out, 2)
    assert figures["warnings"] == ["WARNING: slow"]
    assert figures.get("pages_per_second") == (rate and pytest.approx(rate))
    if rate:
        assert figures["of_each"] == pytest.approx([2.0, 0.4])
        assert figures["began_apart_seconds"] == 7


def small_png(folder: Path, seed: int) -> None:
    Image.effect_noise((96, 128), 50).save(folder / f"page-{seed:06d}.png")


def small_pdf(folder: Path, first: int, count: int) -> None:
    sheets = [Image.effect_noise((96, 128), 50) for _ in range(count)]
    sheets[0].save(folder / f"scan-{first:06d}.pdf", save_all=True, append_images=sheets[1:])


def test_workers_import_nothing_heavy() -> None:
    """They import the main module of the program that starts them."""
    for module in ("demo.benchmarks.embed_corpus", "stages.embed", "colqwen3.cli"):
        code = (
            f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )  # fmt: skip
        assert done.stdout == "[]\n", module


def test_no_shards_are_not_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    assert not corpus_steps.same_bytes(first, second)
    for folder in (first, second):
        (folder / "shard-000000.parquet").write_bytes(b"same")
    (second / "shard-000001.parquet").write_bytes(b"not in the first")
    assert corpus_steps.same_bytes(first, second)
    (second / "shard-000000.parquet").write_bytes(b"other")
    assert not corpus_steps.same_bytes(first, second)
