"""Damaged models, params, data and results through the real commands: one line, nothing lost."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from colqwen3.embedding.store import read_embeddings
from tests.helpers.allocation import write_allocations
from tests.helpers.command import Done, fork_stage, run_stage
from tests.helpers.work import RECIPES, make_work, results, write_params, write_queries

INDEX = "model/model.safetensors.index.json"
SHARD = "model/model-00002-of-00003.safetensors"
Damage = Callable[[Path], None]

INSPECT = ["inspect_model"]
CALIBRATE = ["calibrate"]
ROUND = ["quantize", "rtn"]
TUNE = ["quantize", "tuned"]
EMBED = ["embed", "original"]
EMBED_RTN = ["embed", "rtn"]
EVALUATE = ["evaluate", "rtn"]
CHECK = ["check"]
GATE = ["gate", "rtn"]
LIGHT = (CHECK, INSPECT, GATE)  # need no torch: as fast in a process of their own


# ---- The folder that is damaged -----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which every stage up to the gate has run on small, sound input."""
    folder = make_work(tmp_path_factory.mktemp("whole") / "work")
    write_allocations(folder, folder / "model", "rtn", "tuned")
    for words in (INSPECT, CALIBRATE, ROUND, EMBED, EMBED_RTN, EVALUATE):
        done = fork_stage(folder, words)
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def work(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "work"))


def run(folder: Path, words: list[str]) -> Done:
    return (run_stage if words in LIGHT else fork_stage)(folder, words)


# ---- Ways to damage it --------------------------------------------------------------------------


def params(key: str, value: object) -> Damage:
    """Set a dotted key of params.yaml."""

    def apply(folder: Path) -> None:
        read = YAML(typ="safe").load(folder / "params.yaml")
        *sections, last = key.split(".")
        place = read
        for section in sections:
            place = place[section]
        place[last] = value
        write_params(folder, read)

    return apply


def config(key: str, value: object) -> Damage:
    """Set a dotted key of the model's config.json."""

    def apply(folder: Path) -> None:
        path = folder / "model/config.json"
        read = json.loads(path.read_text())
        *sections, last = key.split(".")
        place = read
        for section in sections:
            place = place[section]
        place[last] = value
        path.write_text(json.dumps(read))

    return apply


def text(path: str, content: str | bytes) -> Damage:
    """Replace a file."""

    def apply(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / path).write_bytes(data)

    return apply


def cut(path: str) -> Damage:
    """Take away the second half of a file."""

    def apply(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: len(data) // 2])

    return apply


def gone(*paths: str) -> Damage:
    """Delete files."""

    def apply(folder: Path) -> None:
        for path in paths:
            (folder / path).unlink()

    return apply


def index(name: str) -> Damage:
    """Have the index name another file for its first tensor."""

    def apply(folder: Path) -> None:
        read = json.loads((folder / INDEX).read_text())
        read["weight_map"][min(read["weight_map"])] = name
        (folder / INDEX).write_text(json.dumps(read))

    return apply


def linked_out(folder: Path) -> None:
    (folder / SHARD).rename(folder / "elsewhere.safetensors")
    (folder / SHARD).symlink_to(folder / "elsewhere.safetensors")


def header(change: Callable[[dict[str, Any]], None], path: str = SHARD) -> Damage:
    """Change the header of a safetensors file and leave its data."""

    def apply(folder: Path) -> None:
        data = (folder / path).read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        read = json.loads(data[8:end])
        change(read)
        raw = json.dumps(read).encode()
        (folder / path).write_bytes(struct.pack("<Q", len(raw)) + raw + data[end:])

    return apply


def overlap(read: dict[str, Any]) -> None:
    entries = [entry for name, entry in read.items() if name != "__metadata__"]
    first, second = next(
        (a, b) for a in entries for b in entries if a is not b and a["shape"] == b["shape"]
    )
    second["data_offsets"] = first["data_offsets"]


def huge(read: dict[str, Any]) -> None:
    next(entry for name, entry in read.items() if name != "__metadata__")["shape"] = [10**15]


def weight(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Change one tensor of the model."""

    def apply(folder: Path) -> None:
        file = json.loads((folder / INDEX).read_text())["weight_map"][name]
        tensors = load_file(folder / "model" / file)
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model" / file)

    return apply


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a change of one number to `value`."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return change


def pickled_only(folder: Path) -> None:
    for path in (folder / "model").glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": torch.zeros(1)}, folder / "model/pytorch_model.bin")


def page(name: str, content: bytes) -> Damage:
    return text(f"data/corpus/{name}", content)


def bomb(folder: Path) -> None:
    """Write a picture of 400 million pixels in some kilobytes."""
    side = 20_000
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + side // 8)) for _ in range(side)) + rows.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    assert len(png) < 100_000
    (folder / "data/corpus/p0.png").write_bytes(png)


def ribbon(folder: Path) -> None:
    Image.new("L", (20_000, 20)).save(folder / "data/corpus/p0.png")


def no_pages(folder: Path) -> None:
    for path in (folder / "data/corpus").iterdir():
        path.unlink()


def unfit(folder: Path) -> None:
    """Leave embeddings that lack a page of the corpus."""
    shutil.copyfile(folder / "data/corpus/p0.png", folder / "data/corpus/p2.png")
    rows = (folder / "data/qrels.tsv").read_text()
    (folder / "data/qrels.tsv").write_text(rows + "q0\tp2\t1\n")


def many(*changes: Damage) -> Damage:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


NORM = "vlm.model.language_model.norm.weight"
DOWN = "vlm.model.language_model.layers.2.mlp.down_proj.weight"
PATCH = "vlm.model.visual.patch_embed.proj.weight"
NO_PDF = b"%PDF-1.4\nnothing"


@dataclass(frozen=True)
class Case:
    """What is damaged, which command must refuse it, and what its line must say."""

    damage: Damage
    words: list[str]
    names: str
    fix: str
    first: tuple[list[str], ...] = ()  # commands that still work


CASES = {
    # model folders
    "shard truncated": Case(cut(SHARD), INSPECT, SHARD, "fetch the file again"),
    "shard missing": Case(gone(SHARD), INSPECT, SHARD, "fetch it again"),
    "index names a parent": Case(index("../x.safetensors"), INSPECT, INDEX, "fix the index"),
    "index names an absolute path": Case(index("/x.safetensors"), INSPECT, INDEX, "fix the index"),
    "shard is a link out of the folder": Case(linked_out, INSPECT, SHARD, "put the file itself"),
    "index is no JSON": Case(cut(INDEX), INSPECT, INDEX, "fetch it again"),
    "header longer than its file": Case(
        text(SHARD, struct.pack("<Q", 10**6) + b"{}"), INSPECT, SHARD, "fetch the file again"
    ),
    "header of 2^63 bytes": Case(
        text(SHARD, struct.pack("<Q", 2**63) + b"{}"), INSPECT, SHARD, "fetch the file again"
    ),
    "tensors overlap": Case(header(overlap), INSPECT, SHARD, "fetch the file again"),
    "tensor of 10^15 numbers": Case(header(huge), INSPECT, SHARD, "fetch the file again"),
    "shard is a web page": Case(text(SHARD, "<!doctype html>" * 9), INSPECT, SHARD, "fetch the file"),
    "shard is a pointer of Git LFS": Case(
        text(SHARD, "version https://git-lfs.github.com/spec/v1\n"), INSPECT, SHARD, "fetch the file"
    ),
    "pickled weights only": Case(pickled_only, INSPECT, "model: ", "convert them to safetensors"),
    "no weights": Case(
        many(pickled_only, gone("model/pytorch_model.bin")), INSPECT, "model: ", "give a complete"
    ),
    "weights of another dtype": Case(
        weight(DOWN, lambda t: t.to(torch.int8)), INSPECT, DOWN, "supported are BF16"
    ),
    "weights of another shape": Case(
        weight(DOWN, lambda t: t.T.contiguous()), INSPECT, DOWN, "correct config.json"
    ),
    "NaN in a linear": Case(
        weight(DOWN, filled(torch.nan)), ROUND, DOWN, "fetch the model again", (INSPECT,)
    ),
    "infinity in a linear, tuned": Case(
        weight(DOWN, filled(torch.inf)), TUNE, DOWN, "fetch it", (INSPECT, CALIBRATE)
    ),
    "infinity in the vision tower": Case(
        weight(PATCH, filled(-torch.inf)), EMBED, PATCH, "fetch it", (INSPECT,)
    ),
    "config is no JSON": Case(cut("model/config.json"), INSPECT, "model/config.json", "give a"),
    "config is missing": Case(gone("model/config.json"), INSPECT, "model/config.json", "give a"),
    "config of another model": Case(
        config("model_type", "qwen3_vl"), INSPECT, "model/config.json", "only 'colqwen3'"
    ),
    "config of a quantized model": Case(
        config("quantization_config", {}), INSPECT, "model/config.json", "give its 16-bit original"
    ),
    "hidden size that no group size divides": Case(
        config("text_config.hidden_size", 100), INSPECT, "model/config.json", "not a multiple of 32"
    ),
    "a billion layers": Case(
        config("text_config.num_hidden_layers", 10**9), INSPECT, "num_hidden_layers", "from 1 to"
    ),
    "a vocabulary of 10^30": Case(
        config("text_config.vocab_size", 10**30), INSPECT, "vocab_size", "from 1 to"
    ),
    "tokenizer is no JSON": Case(
        cut("model/tokenizer.json"), CALIBRATE, "model: processor", "fetch the folder", (INSPECT,)
    ),
    "preprocessor config is no JSON": Case(
        cut("model/preprocessor_config.json"), CALIBRATE, "model: ", "fetch the folder", (INSPECT,)
    ),
    "model changed after its inspection": Case(
        weight(NORM, filled(3.0)), CALIBRATE, "model/model-", "run `dvc repro -f inspect`"
    ),
    "no such model": Case(params("model.source", "nowhere"), INSPECT, "no folder nowhere", "correct it"),
    "no network": Case(
        many(params("model.source", "owner/name"), params("model.revision", "6" * 40)),
        INSPECT, "owner/name", "check the name",
    ),
    # params
    "unknown key": Case(params("embed.batch", 3), CHECK, "embed.batch", "unknown key"),
    "text for a number": Case(
        params("embed.queries_per_batch", "16"), CHECK, "embed.queries_per_batch", "integer"
    ),
    "1e-3 as text": Case(params("recipes.tuned.lr", "1e-3"), CHECK, "recipes.tuned.lr", "number"),
    "5 bits": Case(params("recipes.rtn.bits", 5), CHECK, "recipes.rtn.bits", "2, 3, 4 or 8"),
    "groups of 100": Case(
        params("recipes.rtn.group_size", 100), CHECK, "recipes.rtn.group_size", "32, 64 or 128"
    ),
    "asymmetric": Case(params("recipes.rtn.sym", False), CHECK, "recipes.rtn.sym", "must be true"),
    "a negative number of samples": Case(
        params("calibration.sets.some.pages", -1), CHECK, "calibration.sets.some.pages",
        "greater than or equal to 0",
    ),
    "more pages than there are": Case(
        params("calibration.sets.some.pages", 3), CHECK, "calibration.sets.some.pages", "lower it"
    ),
    "no recipes": Case(params("recipes", {}), CHECK, "recipes", "give at least one"),
    "a slash in a recipe's name": Case(
        params("recipes", {"../x": RECIPES["rtn"]}), CHECK, "'../x'", "use lower-case letters"
    ),
    "a set that is not there": Case(
        params("recipes.tuned.calibration", "other"), CHECK, "recipes.tuned.calibration", "known: some"
    ),
    "an unknown recipe": Case(
        many(), ["quantize", "other"], "recipes.other", "known: rtn, tuned"
    ),
    "params are no YAML": Case(text("params.yaml", "a: [1"), CHECK, "params.yaml", "not valid YAML"),
    "params are empty": Case(text("params.yaml", ""), CHECK, "params.yaml", "valid dictionary"),
    "params are missing": Case(gone("params.yaml"), CHECK, "params.yaml", "No such file"),
    # data
    "a corpus without pages": Case(no_pages, EMBED, "data/corpus", "put the pages there"),
    "no corpus": Case(
        lambda folder: shutil.rmtree(folder / "data/corpus"), EMBED, "data/corpus", "give the pages"
    ),
    "a damaged PNG": Case(cut("data/corpus/p0.png"), EMBED, "corpus/p0.png", "replace or remove"),
    "an empty PNG": Case(page("p0.png", b""), EMBED, "corpus/p0.png", "replace or remove"),
    "a text called PNG": Case(page("p0.png", b"hello"), EMBED, "corpus/p0.png", "replace or remove"),
    "a decompression bomb": Case(bomb, EMBED, "corpus/p0.png", "shrink it"),
    "20000 x 20 pixels to embed": Case(ribbon, EMBED, "corpus/p0.png", "crop or split it"),
    "20000 x 20 pixels to tune on": Case(
        many(ribbon, params("calibration.sets.some.pages", 2)), CALIBRATE, "corpus/p0.png", "crop"
    ),
    "a damaged PDF": Case(page("p2.pdf", NO_PDF), EMBED, "corpus/p2.pdf", "replace or remove"),
    "no queries": Case(text("data/queries.jsonl", ""), EMBED, "queries.jsonl", "write one"),
    "an empty query": Case(
        lambda folder: write_queries(folder, {"q0": "a", "q1": ""}),
        EMBED, "queries.jsonl: line 2", "write one or remove the line",
    ),
    "queries cut off": Case(text("data/queries.jsonl", '{"_id": "q0", "te'), EMBED, "queries.jsonl: line", "fix it"),
    "half a character": Case(
        text("data/queries.jsonl", '{"_id": "q0", "text": "\\ud83d"}\n'),
        EMBED, "queries.jsonl: line 1", "fix the",
    ),
    "a judgement of a page that is not there": Case(
        text("data/qrels.tsv", "query-id\tcorpus-id\tscore\nq0\tp9\t1\n"),
        EVALUATE, "qrels.tsv: line 2", "give a file name",
    ),
    # results of earlier stages, from a damaged cache
    "manifest cut off": Case(
        cut("artifacts/manifest.json"), CALIBRATE, "manifest.json", "run `dvc repro inspect`"
    ),
    "index of samples cut off": Case(
        cut("artifacts/calibration/some/index.json"), TUNE, "some/index.json", "-f calibrate`"
    ),
    "a sample cut off": Case(
        cut("artifacts/calibration/some/sample-00001.safetensors"), TUNE, "calibration/some",
        "-f calibrate`",
    ),
    "allocation cut off": Case(
        cut("artifacts/allocation/rtn.json"), ROUND, "allocation/rtn.json", "-f allocate`"
    ),
    "allocation without linears": Case(
        text("artifacts/allocation/rtn.json", "{}"), ROUND, "allocation/rtn.json", "-f allocate`"
    ),
    "checkpoint cut off": Case(
        cut("artifacts/checkpoints/rtn/model.safetensors"), EMBED_RTN, "rtn/model.safetensors",
        "fetch the file again",
    ),
    "checkpoint without config": Case(
        gone("artifacts/checkpoints/rtn/config.json"), EMBED_RTN, "rtn/config.json", "give a complete"
    ),
    "embeddings cut off": Case(
        cut("artifacts/embeddings/rtn.safetensors"), EVALUATE, "rtn.safetensors", "embed again"
    ),
    "embeddings of other pages": Case(unfit, EVALUATE, "'p2'", "run `dvc repro`"),
    "metrics cut off": Case(
        cut("artifacts/quantize/rtn.json"), EVALUATE, "quantize/rtn.json", "repro quantize@rtn`"
    ),
    "metrics without a figure": Case(
        many(text("metrics/quality/rtn.json", "{}"), params("gate.max_bytes", 10**9)),
        GATE, "metrics/quality/rtn.json", "repro evaluate@rtn`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_line_and_nothing_is_lost(work: Path, name: str) -> None:
    case = CASES[name]
    case.damage(work)
    for words in case.first:
        assert run(work, words).code == 0
    before = results(work)
    assert before
    done = run(work, case.words)
    assert done.code == 1, done.err
    assert len(done.errors) == 1, done.err
    assert done.err.splitlines()[-1] == done.errors[0]
    assert case.names in done.errors[0]
    assert case.fix in done.errors[0]
    assert "Traceback" not in done.err
    assert results(work) == before


# ---- Odd, but sound ------------------------------------------------------------------------------

ODD_TEXTS = {
    "long": "a " * 10_000,
    "controls": "a\x00b\x07c\x1b[31md\x7f\u200b\ufeff",
    "lines": "one\r\ntwo\u2028three\tfour",
    "arabic": "\u0645\u0627 \u0647\u0648 \u0627\u0644\u0645\u062c\u0645\u0648\u0639\u061f",
    "overridden": "\u202eabc\u202c \u05d0\u05d1\u05d2",
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea 5\ufe0f\u20e3",
    "special": "<|image_pad|><|vision_start|><|endoftext|> total",
    "spaced": "  total of the year \n",
    "plain": "total of the year",
    "combining": "e" + "\u0301" * 500,
}


def write_odd_pages(folder: Path) -> list[str]:
    grey = Image.linear_gradient("L").resize((96, 128))
    rgb = grey.convert("RGB")
    pages = {
        "one.png": Image.new("RGB", (1, 1), "white"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "rgba.png": rgb.convert("RGBA"),
        "bilevel.png": grey.convert("1"),
        "palette.png": rgb.convert("P"),
        "grey.png": grey,
        "sixteen.png": grey.convert("I").point(lambda value: value * 257).convert("I;16"),
        "tall.png": Image.new("L", (20, 4000)),
    }
    for path in folder.iterdir():
        path.unlink()
    for name, image in pages.items():
        image.save(folder / name)
    return sorted(Path(name).stem for name in pages)


def test_odd_pages_and_texts_are_embedded(work: Path) -> None:
    pages = write_odd_pages(work / "data/corpus")
    write_queries(work, ODD_TEXTS)
    scratch = work / "artifacts/scratch/original.embed"
    scratch.mkdir(parents=True)
    (scratch / "state.json").write_text('{"key": "of another run", "steps": [')
    done = run(work, EMBED)
    assert done.code == 0, done.err
    result = read_embeddings(work / "artifacts/embeddings/original.safetensors")
    assert list(result.queries) == list(ODD_TEXTS)
    assert sorted(result.pages) == pages
    for name, vectors in {**result.queries, **result.pages}.items():
        norms = vectors.double().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-5, rtol=0), name
    assert len(result.queries["long"]) >= 10_000
    # text that looks like a special token is text: each is many tokens, not one
    assert len(result.queries["special"]) > 10 + 3 + len("total")
    torch.testing.assert_close(result.queries["spaced"], result.queries["plain"], atol=1e-5, rtol=0)
    # 16 bits show what 8 bits show, not a white page
    torch.testing.assert_close(result.pages["sixteen"], result.pages["grey"], atol=1e-5, rtol=0)
    assert not scratch.exists()


def test_odd_pages_are_tuned_on(work: Path) -> None:
    count = len(write_odd_pages(work / "data/corpus"))
    params("calibration.sets.some.pages", count)(work)
    done = run(work, CALIBRATE)
    assert done.code == 0, done.err
    index = json.loads((work / "artifacts/calibration/some/index.json").read_text())
    assert len(index["samples"]) == count + 1


def test_there_are_as_many_cases_as_promised() -> None:
    assert len(CASES) >= 40
