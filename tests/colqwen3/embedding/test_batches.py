"""Embedding: the command, the batching, and what it writes against single forwards."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stages.embed as embed_module
from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages, open_page
from colqwen3.embedding.batches import (
    count_visual_tokens,
    embed_all,
    page_batches,
    prepare_ahead,
    text_batches,
)
from colqwen3.embedding.job import determinants, embed_into, most_bytes
from colqwen3.embedding.store import read_embeddings, write_embeddings
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import UserError
from colqwen3.system.resume import Scratch, work_key
from stages.embed import parse_arguments
from stages.pipeline.params import load_params

GOLDEN = Path("tests/golden")
META = json.loads((GOLDEN / "golden_meta.json").read_text())
EMBEDDINGS = load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "queries.jsonl"
    texts = json.loads((GOLDEN / "inputs/queries.json").read_text())
    kept = {name: text for name, text in texts.items() if text.strip()}
    lines = [json.dumps({"_id": name, "text": text}) for name, text in reversed(kept.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def embed(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.embed", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_gives_the_golden_embeddings(queries: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.safetensors"
    done = embed(
        "--model", GOLDEN / "model", "--queries", queries, "--pages", GOLDEN / "inputs/pages",
        "--out", out, "--dtype", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    names = [json.loads(line)["_id"] for line in queries.read_text().splitlines()]
    stems = sorted(path.stem for path in (GOLDEN / "inputs/pages").iterdir())
    assert found.keys() == {f"query/{n}" for n in names} | {f"page/{s}" for s in stems}
    for key, vectors in found.items():
        kind, name = key.split("/")
        rows = META["pages"][name].get("rows") if kind == "page" else None
        kept = vectors if rows is None else vectors[rows]
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(kept, EMBEDDINGS[key], atol=1e-5, rtol=0)
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
    done = embed(*args, "--out", tmp_path / "out.safetensors")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        ["original", "--out", "x.safetensors"],
        ["--model", "tests/golden/model", "--pages", "p", "--out", "p.png"],
        ["original", "--model", "tests/golden/model"],
    ],
)
def test_arguments_that_contradict_are_refused(
    args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["embed", *args])
    with pytest.raises(SystemExit) as caught:
        parse_arguments()
    assert caught.value.code == 2


def test_batches_keep_order_and_budget() -> None:
    processor = load_processor(GOLDEN / "model", 1280)
    sizes = {"a": (256, 256), "b": (256, 512), "c": (256, 256), "d": (512, 1024), "e": (256, 256)}
    pages = [(name, Image.new("RGB", size)) for name, size in sizes.items()]
    tokens = {name: w * h // 1024 for name, (w, h) in sizes.items()}  # 32 x 32 pixels a token
    batches = [names for names, _ in page_batches(pages, processor, 300)]
    assert batches == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [name for names in batches for name in names] == list(sizes)
    for names in batches:
        assert len(names) == 1 or len(names) * max(tokens[name] for name in names) <= 300


def test_pages_of_a_pdf_embed_as_images_of_them(tmp_path: Path) -> None:
    sheets = [Image.linear_gradient("L").rotate(90 * turn).convert("RGB") for turn in range(2)]
    (tmp_path / "pdf").mkdir()
    (tmp_path / "png").mkdir()
    sheets[0].save(tmp_path / "pdf/m.pdf", save_all=True, append_images=sheets[1:], resolution=100)
    sheets[0].save(tmp_path / "pdf/a.png")
    for name, page in find_pages(tmp_path / "pdf").items():
        open_page(page).save(tmp_path / f"png/{name}.png")
    processor = load_processor(GOLDEN / "model", 1280)
    model = load_model(GOLDEN / "model", torch.float32, torch.device("cpu"))
    from_pdf, from_png = (
        embed_all(model, processor, {}, find_pages(tmp_path / kind), load_params())[1]
        for kind in ("pdf", "png")
    )
    assert list(from_pdf) == list(from_png) == ["a", "m-1", "m-2"]
    assert all(torch.equal(from_pdf[name], from_png[name]) for name in from_pdf)


def test_visual_tokens_are_counted_as_the_processor_makes_them() -> None:
    processor = load_processor(GOLDEN / "model", 1280)
    for path in sorted((GOLDEN / "inputs/pages").glob("*.png")):
        image = Image.open(path)
        made = processor.process_images([image])["image_grid_thw"].prod().item() // 4
        assert count_visual_tokens(path.stem, image, processor) == made
    with pytest.raises(UserError, match=r"page 'banner': .*aspect ratio"):
        count_visual_tokens("banner", Image.new("RGB", (4020, 20)), processor)


def test_bytes_are_bounded_without_opening_a_page() -> None:
    queries = {"a": "né", "b": "x"}  # three bytes and one, ten tokens behind each
    assert most_bytes(queries, range(2), 100, 8) == (3 + 10 + 1 + 10 + 2 * 111) * 8 * 4


def test_the_bound_holds_for_what_is_made(queries: Path) -> None:
    model = load_model(GOLDEN / "model", torch.float32, torch.device("cpu"))
    processor = load_processor(GOLDEN / "model", 1280)
    texts = read_queries(queries)
    pages = find_pages(GOLDEN / "inputs/pages")
    made = embed_all(model, processor, texts, pages, load_params())
    sizes = [sum(t.numel() * t.element_size() for t in kind.values()) for kind in made]
    width = model.config.embed_dim
    assert sizes[0] <= most_bytes(texts, [], 1280, width)
    assert sizes[1] <= most_bytes({}, pages, 1280, width)


def test_a_disk_too_small_is_refused_before_embedding(
    queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["embed", "--model", str(GOLDEN / "model"), "--queries", str(queries)]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "new" / "e.safetensors")])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100))
    monkeypatch.setattr(embed_module, "make_deterministic", lambda: None)
    monkeypatch.setattr(embed_module, "embed_all", lambda *_: pytest.fail("was embedded"))
    with pytest.raises(UserError, match="bytes for the embeddings"):
        embed_module.main()
    assert not list(tmp_path.iterdir())


class SlowFirst:
    """A processor that takes longest for what comes first, and counts what is under way."""

    def __init__(self) -> None:
        self.started = 0

    def process_images(self, images: list[int]) -> list[int]:
        self.started += 1
        time.sleep(0.2 / (1 + images[0]))
        return [-image for image in images]


def test_batches_prepared_ahead_keep_their_order_and_are_few() -> None:
    processor, taken = SlowFirst(), 0
    batches = (([f"p{i}"], [i]) for i in range(12))
    for number, (names, inputs) in enumerate(prepare_ahead(batches, processor)):  # type: ignore[arg-type]
        assert (names, inputs) == ([f"p{number}"], [-number])
        taken += 1
        assert processor.started <= taken + embed_module.AHEAD
    assert taken == 12


def test_what_fails_ahead_fails_the_stage() -> None:
    def batches() -> Iterator[tuple[list[str], list[Image.Image]]]:
        yield ["a"], [Image.new("RGB", (64, 64))]
        raise UserError("b.png: is empty")

    processor = load_processor(GOLDEN / "model", 1280)
    with pytest.raises(UserError, match=r"b\.png"):
        list(prepare_ahead(batches(), processor))


# ---- Going on after a crash ---------------------------------------------------------------------


class Crash(Exception):
    pass


def test_a_crash_loses_no_part_and_changes_no_byte(
    queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processor = load_processor(GOLDEN / "model", 1280)
    model = load_model(GOLDEN / "model", torch.float32, torch.device("cpu"))
    texts, pages = read_queries(queries), find_pages(GOLDEN / "inputs/pages")
    params = load_params()
    bounds = params.embed.model_copy(
        update={"queries_per_batch": 2, "visual_tokens_per_batch": 600}
    )
    params = params.model_copy(update={"embed": bounds})
    forwards = 0
    embed_batch = embed_module.embed

    most = float("inf")

    def counted(model: object, inputs: object) -> list[torch.Tensor]:
        nonlocal forwards
        if forwards >= most:
            raise Crash
        forwards += 1
        return embed_batch(model, inputs)

    monkeypatch.setattr("stages.parts.PART_ITEMS", 2)
    monkeypatch.setattr(embed_module, "embed", counted)
    wanted = embed_all(model, processor, texts, pages, params)
    write_embeddings(tmp_path / "wanted", *wanted)
    whole, forwards = forwards, 0
    done = []
    for allowed in (1, 2, 3, float("inf")):  # each crash lets so many batches more be made
        forwards, most = 0, allowed
        with caplog.at_level("INFO"), Scratch(tmp_path / "work", "key") as scratch:
            try:
                parts = embed_into(scratch, model, processor, texts, pages, params)
            except Crash:
                continue
            finally:
                done.append(forwards)
            write_embeddings(tmp_path / "found", parts.of("query", texts), parts.of("page", pages))
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()
    assert done[:3] == [1, 2, 3]
    # a batch is made again only if it had not filled its part
    assert whole <= sum(done) <= whole + 3
    assert "going on: 2 of" in caplog.text


def test_whatever_determines_the_result_is_in_the_key(queries: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))
    corpus = Path(shutil.copytree(GOLDEN / "inputs/pages", tmp_path / "pages"))
    texts, params, cpu = read_queries(queries), load_params(), torch.device("cpu")

    def key(texts: dict[str, str] = texts, dtype: str = "float32") -> str:
        return work_key(determinants(folder, texts, find_pages(corpus), params, dtype, cpu))

    keys = [key(), key(dtype="bfloat16"), key(dict(reversed(texts.items())))]
    assert key() == keys[0]
    params = params.model_copy(
        update={"embed": params.embed.model_copy(update={"queries_per_batch": 3})}
    )
    keys.append(key())
    Image.new("L", (64, 64)).save(sorted(corpus.iterdir())[0])
    keys.append(key())
    (folder / "tokenizer_config.json").write_text("{}")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_long_text_goes_alone_and_keeps_its_place() -> None:
    texts = {"a": "x", "b": "x" * 5000, "c": "x", "d": "x", "e": "x", "f": "x" * 5000}
    assert list(text_batches(texts, 2)) == [["a"], ["b"], ["c", "d"], ["e"], ["f"]]
    assert list(text_batches({}, 2)) == []
