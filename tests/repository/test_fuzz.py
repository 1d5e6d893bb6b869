"""Whatever the files hold, readers return or refuse in one line; nothing else comes out of them.

`python -m tests.slow.fuzz` runs the same properties for an hour.
"""

import copy
import functools
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML
from safetensors import safe_open

from colqwen3.checkpoint.headers import read_header, read_headers
from colqwen3.dataset.beir import read_dataset, read_queries
from colqwen3.dataset.pages import Page, open_page
from colqwen3.inspection import check_layout, read_config
from colqwen3.system.errors import UserError
from stages.checking.params import Params
from stages.pipeline.params import load_params
from tests.helpers.odd_pages import PAGES

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(EXAMPLES or 50),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
WORK = Path(tempfile.mkdtemp(prefix="fuzz-"))
SHIPPED = YAML(typ="safe", pure=True).load(Path("params.yaml").read_text())
CONFIG = json.loads(Path("tests/golden/model/config.json").read_text())
HEADERS = read_headers(Path("tests/golden/model"))

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["1e-3", "../x", "a/b", "none", "rtn", "\x00", "\ud800", 2**31, 10**30, -1])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def answer(read: Callable[..., Any], *args: Any) -> Any:
    """Return what a reader returns, None where it refuses in one printable line."""
    try:
        return read(*args)
    except UserError as error:
        said = str(error)
        assert said.isprintable()
        assert 5 < len(said) < 10_000
        return None


@functools.cache
def places(value: str) -> list[tuple[Any, ...]]:
    """Return the path to every value within a JSON text."""
    actual: list[tuple[Any, ...]] = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, inner in items:
            actual.append((*path, key))
            if isinstance(inner, dict | list):
                walk(inner, (*path, key))

    walk(json.loads(value), ())
    return actual


def changed(whole: Any) -> st.SearchStrategy[Any]:
    """Strategy of copies of a JSON value with some values replaced, removed or added."""

    @st.composite
    def make(draw: st.DrawFn) -> Any:
        result = copy.deepcopy(whole)
        for _ in range(draw(st.integers(1, 3))):
            *path, last = draw(st.sampled_from(places(json.dumps(whole))))
            place = result
            try:
                for key in path:
                    place = place[key]
                kind = draw(st.sampled_from(["replace", "remove", "add"]))
                if kind == "replace":
                    place[last] = draw(values)
                elif kind == "remove":
                    del place[last]
                else:
                    place[draw(st.text(max_size=8))] = draw(values)
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        return result

    return make()


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Strategy of a file's bytes with some of them cut out, replaced or put in."""
    result = data
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(result)))
        end = draw(st.integers(start, min(len(result), start + 40)))
        result = result[:start] + draw(st.binary(max_size=12)) + result[end:]
    return result


def file(name: str, data: bytes) -> Path:
    path = WORK / name
    path.write_bytes(data)
    return path


# ---- params.yaml --------------------------------------------------------------------------------


def dumped(value: Any) -> bytes:
    out = io.BytesIO()
    YAML(typ="safe", pure=True).dump(value, out)
    return out.getvalue()


def check_params(data: bytes) -> None:
    actual = answer(load_params, Params, file("params.yaml", data))
    assert actual is None or isinstance(actual, Params)


@fuzz
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode(errors="replace")))
def test_params_of_any_bytes(data: bytes) -> None:
    check_params(data)


@fuzz
@given(changed(SHIPPED))
def test_params_with_any_values(value: Any) -> None:
    try:
        data = dumped(value)
    except UnicodeEncodeError:
        return  # half a character is no file
    check_params(data)


@fuzz
@given(damaged(dumped(SHIPPED)))
def test_damaged_params(data: bytes) -> None:
    check_params(data)


# ---- safetensors headers and configs ------------------------------------------------------------


def check_header(data: bytes) -> None:
    """Check that what is accepted, the library accepts too, with the same tensors."""
    path = file("model.safetensors", data)
    actual = answer(read_header, path)
    if actual is not None:
        with safe_open(path, framework="np") as library:
            assert set(library.keys()) == set(actual)
            for name in actual:
                assert tuple(library.get_slice(name).get_shape()) == actual[name].shape


def with_header(raw: bytes, length: int | None = None, tail: int = 0) -> bytes:
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(tail)


ENTRIES = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}
WHOLE = with_header(json.dumps(ENTRIES).encode(), tail=22)


@fuzz
@given(st.binary(max_size=100), st.none() | st.integers(0, 2**64 - 1), st.integers(0, 40))
def test_header_of_any_bytes(raw: bytes, length: int | None, tail: int) -> None:
    check_header(with_header(raw, length, tail))


@fuzz
@given(changed(ENTRIES), st.sampled_from([0, 16, 22, 40]))
def test_header_with_any_values(value: Any, tail: int) -> None:
    check_header(with_header(json.dumps(value).encode(), tail=tail))


@fuzz
@given(damaged(WHOLE))
def test_damaged_header(data: bytes) -> None:
    check_header(data)


@fuzz
@given(changed({"weight_map": dict.fromkeys("ab", "model.safetensors")}))
def test_index_with_any_values(value: Any) -> None:
    folder = WORK / "indexed"
    folder.mkdir(exist_ok=True)
    file("indexed/model.safetensors", WHOLE)
    file("indexed/model.safetensors.index.json", json.dumps(value).encode())
    actual = answer(read_headers, folder)
    assert actual is None or {tensor.file for tensor in actual.values()} == {"model.safetensors"}


@fuzz
@given(changed(CONFIG))
def test_config_with_any_values(value: Any) -> None:
    folder = WORK / "configured"
    folder.mkdir(exist_ok=True)
    file("configured/config.json", json.dumps(value).encode())
    config = answer(read_config, folder)
    if config is not None:
        answer(check_layout, folder, config, HEADERS)


# ---- Datasets -----------------------------------------------------------------------------------

QUERY = {"_id": "q", "text": "total of the year"}
LINES = b'{"_id": "q", "text": "t"}\n{"_id": "r", "text": "\xc3\xa9"}\n'
QRELS = b"query-id\tcorpus-id\tscore\nq\tp\t1\nr\tp\t2\n"


def check_dataset(queries: bytes, qrels: bytes) -> None:
    folder = WORK / "data"
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    file("data/corpus/p.png", b"listed, not read")
    file("data/queries.jsonl", queries)
    file("data/qrels.tsv", qrels)
    actual = answer(read_dataset, folder)
    if actual is not None:
        assert set(actual.relevance) == set(actual.queries)
        assert all(text.strip() and text.encode() for text in actual.queries.values())


@fuzz
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_dataset_of_any_bytes(queries: bytes, qrels: bytes) -> None:
    check_dataset(queries, qrels)


@fuzz
@given(damaged(LINES), damaged(QRELS))
def test_damaged_dataset(queries: bytes, qrels: bytes) -> None:
    check_dataset(queries, QRELS)
    check_dataset(LINES, qrels)


@fuzz
@given(st.lists(changed(QUERY) | values, max_size=4))
def test_queries_with_any_values(lines: list[Any]) -> None:
    path = file("queries.jsonl", "\n".join(map(json.dumps, lines)).encode())
    answer(read_queries, path)


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).save(out, kind)
    return out.getvalue()


@fuzz
@given(damaged(picture("PNG")) | damaged(picture("JPEG")))
def test_damaged_page(data: bytes) -> None:
    answer(open_page, Page(file("p.png", data)))


KINDS = ("turned 6 jpeg", "turned 3 png", "rgba", "palette, alpha as bytes", "rgb with a colour key",
         "16-bit grey", "16-bit rgba", "cmyk with a profile")  # fmt: skip


@fuzz
@given(st.sampled_from(KINDS).flatmap(lambda kind: damaged(PAGES[kind][1]())))
def test_damaged_page_of_another_kind(data: bytes) -> None:
    page = answer(open_page, Page(file("p.png", data)))
    assert page is None or page.mode == "RGB"


@pytest.fixture(scope="module", autouse=True)
def remove_work() -> Any:
    yield
    for path in sorted(WORK.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    WORK.rmdir()
