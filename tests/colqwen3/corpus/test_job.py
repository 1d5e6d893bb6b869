"""A collection in shards: equal bytes after kills, with damaged pages, and by several processes."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from colqwen3.corpus import job
from colqwen3.corpus.formats import FORMATS, decode
from colqwen3.corpus.job import CorpusOptions, Part, Plan, embed_corpus, plan_corpus
from colqwen3.corpus.shards import read_vectors
from colqwen3.corpus.sources import find_sources
from colqwen3.dataset.pages import Page
from colqwen3.embedding.embedder import Embedder, Plain, embed_pages
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import UserError
from colqwen3.system.lock import Lock

MODEL = Path("tests/golden/model").absolute()
CPU = torch.device("cpu")
OPTIONS = CorpusOptions(max_num_visual_tokens=16, visual_tokens_per_batch=40, pages_per_shard=4)
SIZES = [(64, 96), (96, 64), (64, 96), (128, 128), (64, 64)]


@pytest.fixture(scope="module")
def embedder() -> Plain:
    processor = load_processor(MODEL, 16)
    return Plain(load_model(MODEL, torch.float32, CPU), processor, torch.float16)


@pytest.fixture(autouse=True)
def loaded_once(embedder: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the model once for all tests; its output is that of the format all the same."""

    def load(*arguments: Any) -> Embedder:
        output = arguments[5]
        return Plain(embedder.model, embedder.processor, output)

    monkeypatch.setattr(job, "load_embedder", load)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with 14 pages in `in`, of several sizes, and be in it."""
    (tmp_path / "in").mkdir()
    for number in range(14):
        noise = np.random.default_rng(number).integers(0, 256, SIZES[number % 5], np.uint8)
        Image.fromarray(noise).save(tmp_path / f"in/p{number:02}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record that deterministic algorithms are asked for, without asking this whole process."""
    asked: list[str] = []
    monkeypatch.setattr(job, "make_deterministic", lambda: asked.append("deterministic"))
    return asked


def run(out: str, part: Part | None = None, model: Path = MODEL, **changes: Any) -> None:
    embed_corpus(plan(out, model, **changes), CPU, part or Part())


def plan(out: str, model: Path = MODEL, **changes: Any) -> Plan:
    return plan_corpus(model, find_sources(["in"]), Path(out), replace(OPTIONS, **changes), CPU)


def contents(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(out).iterdir())}


def test_shards_hold_the_vectors_of_the_pages(folder: Path, embedder: Plain) -> None:
    run("out", format="float32")
    names = ["_manifest.json", *(f"shard-{n:06}.parquet" for n in range(4))]
    assert list(contents("out")) == names
    stored = {key: decode(value, "float32") for key, value in read_vectors(Path("out"))}
    assert list(stored) == [f"in/p{number:02}.png" for number in range(14)]
    alone = Plain(embedder.model, embedder.processor)
    for key, vectors in stored.items():
        ((expected),) = embed_pages(alone, {key: Page(Path(key))}, 1)
        torch.testing.assert_close(vectors, expected[key], atol=1e-5, rtol=0)
    manifest = json.loads(Path("out/_manifest.json").read_text())
    assert (manifest["complete"], manifest["embedded"], manifest["failed"]) == (True, 14, 0)
    assert manifest["bytes"] == sum(path.stat().st_size for path in Path("out").glob("*.parquet"))
    assert manifest["settings"]["recipe"] is None


@pytest.mark.parametrize("moment", ["while written", "before the rename", "after the rename"])
def test_a_kill_at_any_moment_costs_no_byte(folder: Path, moment: str) -> None:
    run("whole")
    for kill_at in (1, 2, 3):  # the first of them is that of the manifest
        process = os.fork()
        if process == 0:
            _die_at(moment, kill_at)
            run("out")
            os._exit(0)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), "was not killed"
    assert contents("out").keys() != contents("whole").keys()
    run("out")
    assert contents("out") == contents("whole")


def _die_at(moment: str, count: int) -> None:
    """Let SIGKILL end this process at the count-th file that it writes."""
    rename, write = os.replace, Path.write_bytes
    left = count

    def replace_(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0 and moment == "before the rename":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_(path: Path, data: bytes) -> int:
        if left == 1 and moment == "while written":
            write(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, data)

    os.replace = replace_  # type: ignore[assignment]
    Path.write_bytes = write_  # type: ignore[method-assign, assignment]


def test_only_missing_and_changed_shards_are_made(
    folder: Path, embedder: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("out")
    before = contents("out")
    monkeypatch.setattr(Plan, "load", lambda *_: pytest.fail("nothing is to be done"))
    run("out")
    assert contents("out") == before
    made: list[int] = []
    write = Plan.write

    def noted(self: Plan, shard: Any, key: str, vectors: Any) -> list[UserError]:
        made.append(shard.number)
        return write(self, shard, key, vectors)

    monkeypatch.setattr(Plan, "write", noted)
    monkeypatch.setattr(
        Plan, "load", lambda *_: Plain(embedder.model, embedder.processor, torch.float16)
    )
    (folder / "out/shard-000000.parquet").unlink()
    (folder / "out/shard-000001.parquet").write_bytes(b"damaged")
    run("out")
    assert (sorted(made), contents("out")) == ([0, 1], before)
    made.clear()
    Image.new("L", (64, 64)).save("in/p05.png")  # a page of shard 1 changes
    Image.new("L", (64, 64)).save("in/p99.png")  # and one more comes at the end
    run("out")
    assert sorted(made) == [1, 3]
    assert len(list(read_vectors(Path("out")))) == 15


def test_what_cannot_be_embedded_is_listed_and_counted(folder: Path) -> None:
    (folder / "in/p02.png").write_bytes(b"")
    (folder / "in/p06.png").write_bytes((folder / "in/p06.png").read_bytes()[:200])
    (folder / "in/q.pdf").write_bytes(b"%PDF-1.4 cut")
    for number in (8, 9, 10, 11):  # a whole shard
        (folder / f"in/p{number:02}.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"^out/_errors.jsonl: 7 of 15 pages could not be embedded"):
        run("out")
    entries = [json.loads(line) for line in Path("out/_errors.jsonl").read_text().splitlines()]
    names = ["p02.png", "p06.png", "p08.png", "p09.png", "p10.png", "p11.png", "q.pdf"]
    assert [entry["id"] for entry in entries] == [f"in/{name}" for name in names]
    reasons = {entry["id"]: entry["reason"] for entry in entries}
    assert "is empty" in reasons["in/p02.png"]
    assert "cannot be read" in reasons["in/p06.png"]
    assert "is damaged, not a PDF" in reasons["in/q.pdf"]
    good = [number for number in range(14) if number not in (2, 6, 8, 9, 10, 11)]
    assert [key for key, _ in read_vectors(Path("out"))] == [f"in/p{n:02}.png" for n in good]
    manifest = json.loads(Path("out/_manifest.json").read_text())
    assert (manifest["embedded"], manifest["failed"], manifest["complete"]) == (8, 7, True)
    # again: nothing to do, and still an error
    with pytest.raises(UserError, match="7 of 15"):
        run("out")
    for entry in entries:
        Path(entry["source"]).unlink()
    with pytest.raises(UserError, match=r"is of more pages than the inputs now have"):
        run("out")


def test_replaced_pages_leave_no_list_of_errors(folder: Path) -> None:
    good = (folder / "in/p06.png").read_bytes()
    (folder / "in/p06.png").write_bytes(b"none")
    with pytest.raises(UserError, match="1 of 14"):
        run("out")
    (folder / "in/p06.png").write_bytes(good)
    run("out")
    assert "_errors.jsonl" not in contents("out")


@pytest.mark.parametrize("file", ["p06.png", "q.pdf"])
def test_strict_ends_at_the_first(folder: Path, file: str) -> None:
    (folder / "in" / file).write_bytes(b"none")
    with pytest.raises(UserError, match=file):
        run("out", strict=True)
    assert not Path("out/_errors.jsonl").exists()


def test_vectors_that_are_not_finite_are_an_error_of_their_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Plain.embed_batches

    def broken(self: Plain, given: Any) -> Iterator[Any]:
        for keys, vectors in batches(self, given):
            for (_, key), tokens in zip(keys, vectors, strict=True):
                if key == "in/p03.png":
                    tokens[0, 0] = torch.inf
            yield keys, vectors

    monkeypatch.setattr(Plain, "embed_batches", broken)
    with pytest.raises(UserError, match="1 of 14"):
        run("out")
    (entry,) = map(json.loads, Path("out/_errors.jsonl").read_text().splitlines())
    assert entry["id"] == "in/p03.png"
    assert "NaN or infinite" in entry["reason"]
    with pytest.raises(UserError, match="NaN or infinite"):
        run("strict", strict=True)


def test_another_model_or_other_options_need_another_folder(folder: Path) -> None:
    run("out")
    before = contents("out")
    model = Path(shutil.copytree(MODEL, folder / "model"))
    run("out", model=model)  # the same model elsewhere
    (model / "tokenizer_config.json").write_text("{}")
    for changes, key in (
        ({"model": model}, "model"),
        ({"format": "int8"}, "format"),
        ({"pages_per_shard": 5}, "pages_per_shard"),
        ({"visual_tokens_per_batch": 50}, "visual_tokens_per_batch"),
        ({"max_num_visual_tokens": 8}, "max_num_visual_tokens"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"activations": "int8"}, "activations"),
    ):
        with pytest.raises(UserError, match=rf"^out/_manifest.json: {key} is .*; give --out a new"):
            run("out", **changes)
    assert contents("out") == before


def start_part(rank: int) -> int:
    """Run one of two parts in a process; its status is 1 on a user's error."""
    process = os.fork()
    if process == 0:
        try:
            run("out", Part(rank, 2, rank, 2))
            os._exit(0)
        except UserError:
            os._exit(1)
    return process


def test_two_processes_make_what_one_makes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "in/p06.png").write_bytes(b"none")
    with pytest.raises(UserError, match="1 of 14"):
        run("whole")
    monkeypatch.setattr(job, "POLL", 0.05)
    first = start_part(0)
    mine = [Path(f"out/shard-{number:06}.parquet") for number in (0, 2)]
    while not all(path.exists() for path in mine):
        time.sleep(0.02)
    time.sleep(0.5)
    assert os.waitpid(first, os.WNOHANG) == (0, 0)  # it waits: its launcher would end the others
    children = [start_part(1), first]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0, 1]  # the first process alone tells of the errors
    assert contents("out") == contents("whole")


def test_one_folder_is_for_one_process_at_a_time(folder: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        Path("out").mkdir()
        lock = Lock(Path("out/.rank-0.lock"))
        lock.take()
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(UserError, match=f"process {process} is working on it"):
        run("out")
    os.write(done[1], b".")
    os.waitpid(process, 0)


@pytest.mark.parametrize("name", ["int8", "binary", "pool2-int8"])
def test_the_format_is_that_asked_for(folder: Path, name: str) -> None:
    run("out", format=name)
    run("exact", format="float32")
    exact = {key: decode(value, "float32") for key, value in read_vectors(Path("exact"))}
    manifest = json.loads(Path("out/_manifest.json").read_text())
    assert manifest["settings"]["format"] == name
    for key, value in read_vectors(Path("out")):
        decoded = decode(value, FORMATS[name].kind)
        if name == "pool2-int8":
            assert len(decoded) == len(exact[key]) // 2
        else:
            assert decoded.shape == exact[key].shape
            cosine = torch.cosine_similarity(decoded, exact[key], dim=-1)
            assert float(cosine.min()) > (0.999 if name == "int8" else 0.6)


def test_workers_change_no_byte(folder: Path) -> None:
    run("inline")
    run("workers", workers=2)
    assert contents("inline") == contents("workers")


def test_a_full_disk_is_seen_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))
    monkeypatch.setattr(Plan, "load", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(UserError, match="for the vectors"):
        run("out")


def test_kernels_are_deterministic_from_the_start(
    folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_embedder", lambda *_: asked.append("loaded"))
    plan("out").load(CPU)
    assert asked == ["deterministic", "loaded"]


def test_the_bound_of_the_bytes_holds_and_is_near(folder: Path) -> None:
    for name in ("float32", "int8", "binary", "pool3-float16"):
        whole = plan(name, format=name)
        embed_corpus(whole, CPU)
        size = sum(value.bytes for _, value in read_vectors(Path(name)))
        # such small pages are enlarged to up to 20 visual tokens, more than their limit
        bound = job._bytes_left(
            replace(whole, options=replace(whole.options, max_num_visual_tokens=20)), 14
        )
        assert size <= bound + 14 * 31 * 2  # and the scales of int8
        assert bound < 1.2 * size
