"""Stock llama.cpp gives the embeddings of torch from the written files: queries, and pages of any size."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from colqwen3.model.loading import load_model, load_processor
from colqwen3.model.processing_colqwen3 import to_rgb
from colqwen3.model.scoring import max_sim
from tests.helpers.golden import PAGES, STEMS
from tests.helpers.odd_pages import PAGES as ODD_PAGES
from tests.helpers.odd_pages import write_page

pytest.importorskip("gguf")
run_gguf = pytest.importorskip("colqwen3.gguf.run_gguf", exc_type=ImportError)
Maker = Callable[[str], Path]
Exporter = Callable[..., Path]
Array = np.ndarray[Any, Any]

QUERIES = (
    "total of the invoice", "  blanks around \n", "e\u0301te\u0301 A\u030a \u212b", "日本語 ไทย عربي 😀👩‍👩‍👧",
    "<|endoftext|><|image_pad|> text", "", "word " * 300,
)  # fmt: skip
"""Decomposed letters, other scripts, what looks like special tokens, none, and a long one."""
FLOATS = (("demo", "float16"), ("other", "float16"))
EXACT, ROUNDED = 0.9999, 0.999
"""Minimum cosine of a token: float weights, and packed ones, for which llama.cpp rounds activations."""


def scan() -> Image.Image:
    """A4 at 300 dpi, with some print on it."""
    page = Image.new("L", (2480, 3508), "white")
    with Image.open(PAGES / "chart_300x400_grey.png") as chart:
        page.paste(chart.resize((1800, 2400)), (340, 500))
    return page


def pages() -> dict[str, Image.Image]:
    """Pages of several sizes and modes; the largest are shrunk, the smallest are enlarged."""
    found = {stem: Image.open(PAGES / f"{stem}.png") for stem in STEMS if "1700" not in stem}
    return {
        **found,
        "scan at 300 dpi": scan(),
        "one pixel": Image.new("RGB", (1, 1), "red"),
        "narrow": found["banner_1600x96_palette"].resize((2000, 10)),
    }


@pytest.fixture(scope="module")
def by_torch(models: Maker) -> Callable[[str, str], Array]:
    """Return the vectors of a query or page in torch, with dequantized weights."""

    @cache
    def load(name: str) -> tuple[Any, Any]:
        folder = models(name)
        model = load_model(folder, torch.float32, torch.device("cpu"))
        return model, load_processor(folder, 1280)

    @cache
    def embed(name: str, key: str) -> Array:
        model, processor = load(name)
        page = pages().get(key)
        inputs = processor.process_images([page]) if page else processor.process_texts([key])
        with torch.inference_mode():
            vectors: Array = model(**inputs).embeddings[0].numpy()
        return vectors

    return embed


@pytest.fixture(scope="module")
def embedder(exported: Exporter) -> Callable[..., Any]:
    @cache
    def load(name: str, dtype: str = "float16") -> Any:
        return run_gguf.Embedder(exported(name, dtype), threads=1)

    return load


@pytest.mark.parametrize(
    ("name", "dtype", "minimum"),
    [
        ("demo", "float32", EXACT),
        ("demo", "float16", EXACT),
        ("other", "float16", EXACT),
        ("w4g32", "float16", ROUNDED),
        ("w4g128", "float16", ROUNDED),
        ("w8g128", "float16", ROUNDED),
        ("w3g64", "float16", ROUNDED),
        ("w4g32-8", "float16", ROUNDED),
        ("w8g64-4", "float16", ROUNDED),
    ],
)
def test_every_token_is_that_of_torch(
    embedder: Callable[..., Any],
    by_torch: Callable[[str, str], Array],
    name: str,
    dtype: str,
    minimum: float,
) -> None:
    ours = embedder(name, dtype)
    actual = {query: ours.embed_query(query) for query in QUERIES}
    # the recipes differ in the language model: two sizes of pages show that
    chosen = pages() if (name, dtype) in FLOATS else ("one pixel", "chart_300x400_grey")
    actual |= {key: ours.embed_page(pages()[key]) for key in chosen}
    for key, vectors in actual.items():
        expected = by_torch(name, key)
        assert vectors.shape == expected.shape, key
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
        assert (vectors * expected).sum(-1).min() >= minimum, key


def test_one_item_never_changes_the_next(embedder: Callable[..., Any]) -> None:
    ours = embedder("w4g32")
    first = ours.embed_query(QUERIES[0])
    ours.embed_page(Image.new("RGB", (64, 64), "blue"))
    ours.embed_query(QUERIES[-1])
    assert np.array_equal(ours.embed_query(QUERIES[0]), first)


def test_a_query_ends_in_ten_augmentation_tokens(
    embedder: Callable[..., Any], models: Maker
) -> None:
    ours, seen = embedder("demo"), []
    processor = load_processor(models("demo"), 64)
    decode = ours._decode
    ours._decode = lambda ids, start: seen.append(ids) or decode(ids, start)  # type: ignore[func-returns-value]
    try:
        for query in QUERIES:
            ours.embed_query(query)
            assert seen[-1] == processor.process_texts([query])["input_ids"][0].tolist()
            assert seen[-1][-10:] == [2034] * 10
    finally:
        del ours._decode


# what takes more lines than the program may have: keys of 16-bit images, profiles of CMYK
OTHERWISE = (
    "16-bit grey with a key", "16-bit rgb with a key", "cmyk with a profile",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ODD_PAGES if name not in OTHERWISE])
def test_pages_are_prepared_as_by_the_processor(
    embedder: Callable[..., Any], models: Maker, tmp_path: Path, name: str
) -> None:
    with Image.open(write_page(name, tmp_path)) as image:
        actual = embedder("demo")._prepare(image)
    with Image.open(tmp_path / ODD_PAGES[name][0]) as image:
        expected = to_rgb(image)
    patches = load_processor(models("demo"), 1280).process_images([expected])
    _, height, width = patches["image_grid_thw"][0].tolist()
    assert actual.size == (16 * width, 16 * height)
    assert actual.tobytes() == expected.resize(actual.size, Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize("size", [(1, 201), (0, 5), (0, 0), (4021, 20)])
def test_a_page_of_an_impossible_size_is_refused(
    embedder: Callable[..., Any], size: tuple[int, int]
) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"error: a page of {size} is impossible")):
        embedder("demo").embed_page(Image.new("RGB", size))


def test_a_query_beyond_the_context_is_refused(embedder: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit, match="may be too long"):
        embedder("demo").embed_query("a b c d e " * 500)
    assert len(embedder("demo").embed_query("fine")) > 10


# ---- The library is the one that the program knows ----------------------------------------------


@pytest.mark.parametrize("version", ["2026.7.10068", "2026.10.11550", "0+unknown"])
def test_another_version_is_refused(
    exported: Exporter, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(run_gguf.xllamacpp, "__version__", version)
    with pytest.raises(SystemExit) as caught:
        run_gguf.Embedder(exported("demo"))
    assert str(caught.value) == (
        f"error: xllamacpp is {version}; run `pip install xllamacpp==2026.10.11549`"
    )


@pytest.mark.parametrize("name", run_gguf.DEFAULTS)
def test_another_layout_of_parameters_is_refused(
    exported: Exporter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As if the library had one more field before the others."""
    moved = {place + 1: value for place, value in run_gguf.DEFAULTS[name].items()}
    monkeypatch.setitem(run_gguf.DEFAULTS, name, moved)
    with pytest.raises(SystemExit, match=f"error: {name} has another layout"):
        run_gguf.Embedder(exported("demo"))


@pytest.mark.parametrize("file", ["text.gguf", "mmproj.gguf"])
def test_damaged_files_are_refused(exported: Exporter, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(exported("w4g32"), tmp_path / "copy"))
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit, match=r"error: .*(llama.cpp cannot|is damaged)"):
        run_gguf.Embedder(folder)
    (folder / file).unlink()
    with pytest.raises(SystemExit, match=r"error: .*llama.cpp cannot"):
        run_gguf.Embedder(folder)


# ---- The program --------------------------------------------------------------------------------


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, folder / "run_gguf.py", "--threads", "1", *arguments],
        capture_output=True, text=True, check=False, cwd="/",
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip


def test_the_program_ranks_pages_by_max_sim(
    exported: Exporter, embedder: Callable[..., Any], tmp_path: Path
) -> None:
    stems = ("chart_300x400_grey", "stamp_61x43_rgba", "banner_1600x96_palette")
    files = [(PAGES / f"{stem}.png").absolute() for stem in stems]
    index = tmp_path / "vectors.npz"
    done = run(exported("w4g32"), "--pages", *files, "--out", index)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run(exported("w4g32"), "--index", index, "--queries", *QUERIES[:2])
    ours = embedder("w4g32")
    vectors = [torch.tensor(ours.embed_page(Image.open(path))) for path in files]
    queries = [torch.tensor(ours.embed_query(query)) for query in QUERIES[:2]]
    expected = []
    for query, scores in zip(QUERIES, max_sim(queries, vectors).tolist(), strict=False):
        ranking = sorted(zip(scores, stems, strict=True), reverse=True)
        expected += [f"{score:9.4f}  {stem}  {query!r}" for score, stem in ranking]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--pages", "missing.png"], "No such file"),
        (["--pages", "run_gguf.py"], "cannot identify image file"),
        (["--index", "run_gguf.py"], "error: "),
        (["--pages", "a/same.png", "b/same.png"], "another page has that name"),
    ],
)
def test_bad_input_is_one_line(
    exported: Exporter, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    folder = Path(shutil.copytree(exported("w4g32"), tmp_path / "copy"))
    for name in ("a", "b"):
        (folder / name).mkdir()
        Image.new("RGB", (40, 40)).save(folder / name / "same.png")
    words = [folder / word if not word.startswith("--") else word for word in arguments]
    done = run(folder, *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_it_is_short_enough_to_be_read() -> None:
    text = Path(run_gguf.__file__).read_text()
    docstrings = sum(
        (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    )
    assert len([line for line in text.splitlines() if line.strip()]) - docstrings <= 200


# ---- llama.cpp's own server ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(exported: Exporter) -> Iterator[str]:
    """Serve as `llama-server --embeddings --pooling none --mmproj mmproj.gguf` does."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(exported("w4g32") / "text.gguf")
    params.mmproj.path = str(exported("w4g32") / "mmproj.gguf")
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    params.embd_normalize = -1
    params.n_ctx, params.n_parallel, params.port, params.verbosity = 2048, 1, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    running = xllamacpp.Server(params)
    yield running.listening_address
    del running


def ask(server: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        server + path, data, {"Content-Type": "application/json"} if data else {}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_server_embeds_queries_by_their_ids(
    server: str, embedder: Callable[..., Any], by_torch: Callable[[str, str], Array]
) -> None:
    ours = embedder("w4g32")
    for query in QUERIES[:6]:
        ids = ours.tokenize(query.strip()) + [2034] * 10
        rows = np.array(ask(server, "/embedding", {"content": ids})[0]["embedding"], np.float32)
        vectors = rows @ ours.weight.T + ours.bias
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        expected = by_torch("w4g32", query)
        assert vectors.shape == expected.shape
        assert (vectors * expected).sum(-1).min() >= ROUNDED


def test_the_server_returns_no_rows_of_a_page(server: str) -> None:
    """What docs/llama-cpp.md says of stock servers; if this fails, they have become of use."""
    import base64

    marker = ask(server, "/props")["media_marker"]
    page = base64.b64encode((PAGES / "chart_300x400_grey.png").read_bytes()).decode()
    prompt = f"<|im_start|>user\n{marker}Describe the image.<|im_end|><|endoftext|>"
    body = {"content": {"prompt_string": prompt, "multimodal_data": [page]}}
    assert len(ask(server, "/embedding", body)[0]["embedding"]) < 10
