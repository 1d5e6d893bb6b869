"""A whole set in one file: bounded on disk, resumed after a crash, and never mixed with other work."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages
from colqwen3.embedding import batches, embedder, job
from colqwen3.embedding.embedder import Plain, embed_all
from colqwen3.embedding.job import (
    EmbeddingOptions,
    determinants,
    embed_into,
    embed_to_file,
    maximum_bytes,
)
from colqwen3.embedding.store import write_embeddings
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import DiskFullError
from colqwen3.system.resume import Scratch, work_key

GOLDEN = Path("tests/golden")
CPU = torch.device("cpu")


def test_bytes_are_bounded_without_opening_a_page() -> None:
    queries = {"a": "né", "b": "x"}  # three bytes and one, ten tokens behind each
    assert maximum_bytes(queries, range(2), 100, 8) == (3 + 10 + 1 + 10 + 2 * 111) * 8 * 4


def test_the_bound_holds_for_what_is_embedded(queries: Path) -> None:
    model = load_model(GOLDEN / "model", torch.float32, CPU)
    processor = load_processor(GOLDEN / "model", 1280)
    texts = read_queries(queries)
    pages = find_pages(GOLDEN / "inputs/pages")
    embedded = embed_all(model, processor, texts, pages, 16, 1280)
    sizes = [sum(t.numel() * t.element_size() for t in kind.values()) for kind in embedded]
    width = model.config.embed_dim
    assert sizes[0] <= maximum_bytes(texts, [], 1280, width)
    assert sizes[1] <= maximum_bytes({}, pages, 1280, width)


def test_a_disk_too_small_is_refused_before_embedding(
    queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "e.safetensors"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))
    monkeypatch.setattr(job, "make_deterministic", lambda: None)
    monkeypatch.setattr(job, "embed_into", lambda *_: pytest.fail("was embedded"))
    work = out.with_name("work")
    texts, options = read_queries(queries), EmbeddingOptions()
    with pytest.raises(DiskFullError, match="bytes for the embeddings"):
        embed_to_file(GOLDEN / "model", texts, {}, out, work, options, "code")
    assert not list(tmp_path.iterdir())


class Crash(Exception):
    pass


def test_a_crash_loses_no_part_and_changes_no_byte(
    queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processor = load_processor(GOLDEN / "model", 1280)
    model = load_model(GOLDEN / "model", torch.float32, CPU)
    texts, pages = read_queries(queries), find_pages(GOLDEN / "inputs/pages")
    options = EmbeddingOptions(queries_per_batch=2, visual_tokens_per_batch=600)
    forwards = 0
    embed_batch = batches.embed
    most = float("inf")

    def counted(model: object, inputs: object) -> list[torch.Tensor]:
        nonlocal forwards
        if forwards >= most:
            raise Crash
        forwards += 1
        return embed_batch(model, inputs)

    monkeypatch.setattr("colqwen3.embedding.parts.PART_ITEMS", 2)
    monkeypatch.setattr(embedder, "embed", counted)
    write_embeddings(tmp_path / "at once", *embed_all(model, processor, texts, pages, 2, 600))
    whole, forwards = forwards, 0
    done = []
    for allowed in (1, 2, 3, float("inf")):  # each crash lets so many more batches through
        forwards, most = 0, allowed
        with caplog.at_level("INFO"), Scratch(tmp_path / "work", "key") as scratch:
            try:
                parts = embed_into(scratch, Plain(model, processor), texts, pages, options)
            except Crash:
                continue
            finally:
                done.append(forwards)
            resumed = parts.of("query", texts), parts.of("page", pages)
            write_embeddings(tmp_path / "resumed", *resumed)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "at once").read_bytes()
    assert done[:3] == [1, 2, 3]
    # a batch is embedded again only if it had not filled its part
    assert whole <= sum(done) <= whole + 3
    assert "continuing: 2 of" in caplog.text


def test_whatever_determines_the_result_is_in_the_key(queries: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))
    corpus = Path(shutil.copytree(GOLDEN / "inputs/pages", tmp_path / "pages"))
    texts = read_queries(queries)

    # of the embedder only device and name count
    plain = Plain(SimpleNamespace(device=CPU), None)

    def key(texts: dict[str, str] = texts, code: str = "code", **options: Any) -> str:
        chosen, pages = EmbeddingOptions(**options), find_pages(corpus)
        return work_key(determinants(folder, texts, pages, chosen, plain, code))

    keys = [key(), key(dtype="bfloat16"), key(dict(reversed(texts.items())))]
    assert key() == keys[0]
    keys += [key(queries_per_batch=3), key(max_num_visual_tokens=64), key(code="other")]
    Image.new("L", (64, 64)).save(sorted(corpus.iterdir())[0])
    keys.append(key())
    (folder / "tokenizer_config.json").write_text("{}")
    keys.append(key())
    plain.name = "another"
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(workers=3) == key()  # which change no bit
