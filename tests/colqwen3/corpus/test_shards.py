"""Shards hold what was embedded, say what they are of, and have equal bytes for equal input."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from colqwen3.corpus.formats import FORMATS, Encoded, encode
from colqwen3.corpus.shards import Shard, read_state, read_vectors, write_shard
from colqwen3.corpus.sources import Source
from colqwen3.system.errors import UserError

PAGES = [Source("a", "x/a.png"), Source("b", "x/b.pdf", 7), Source("c", "x/c.png"),
         Source("d", "x/d.png")]  # fmt: skip


def vectors(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.nn.functional.normalize(torch.randn(tokens, 16, generator=generator), dim=-1)


def write(path: Path, name: str) -> dict[str, Encoded | UserError]:
    format_ = FORMATS[name]
    pages: dict[str, Encoded | UserError] = {
        page.id: encode(vectors(4 + number), format_) for number, page in enumerate(PAGES)
    }
    pages["c"] = UserError("x/c.png: is empty; replace it")
    width = 2 if format_.kind == "binary" else 16
    write_shard(path, Shard(0, PAGES), "key", pages, format_.kind, width, "m" * 64, None)
    return pages


@pytest.mark.parametrize("name", FORMATS)
def test_a_shard_gives_back_what_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "shard-000000.parquet"
    pages = write(path, name)
    assert [key for key, _ in read_vectors(tmp_path)] == ["a", "b", "d"]
    for key, stored in read_vectors(tmp_path):
        expected = pages[key]
        assert isinstance(expected, Encoded)
        assert stored.values.dtype == expected.values.dtype
        assert np.array_equal(stored.values, expected.values)
        if expected.scales is None:
            assert stored.scales is None
        else:
            assert stored.scales is not None
            assert np.array_equal(stored.scales, expected.scales)
    failed = [
        {"id": "c", "source": "x/c.png", "page": None, "reason": "x/c.png: is empty; replace it"}
    ]
    assert read_state(path) == {"key": "key", "failed": failed, "rows": 3}
    before = path.read_bytes()
    write(path, name)
    assert path.read_bytes() == before


def test_any_reader_of_parquet_sees_rows_and_fixed_size_lists(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.parquet"
    pages = write(path, "float16")
    rows = pq.read_table(path).to_pylist()
    assert [(row["id"], row["source"], row["page"]) for row in rows] == [
        ("a", "x/a.png", None), ("b", "x/b.pdf", 7), ("d", "x/d.png", None),
    ]  # fmt: skip
    assert {(row["model"], row["recipe"]) for row in rows} == {("m" * 64, None)}
    assert isinstance(pages["b"], Encoded)
    assert np.array_equal(np.array(rows[1]["vectors"], np.float16), pages["b"].values)
    kind = pq.read_schema(path).field("vectors").type
    assert pa.types.is_fixed_size_list(kind.value_type)
    assert (kind.value_type.list_size, kind.value_type.value_type) == (16, pa.float16())


def test_a_shard_of_failures_alone_is_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.parquet"
    failed = {page.id: UserError("no") for page in PAGES}
    write_shard(path, Shard(0, PAGES), "key", failed, "int8", 16, "m", "r")
    state = read_state(path)
    assert state is not None
    assert (state["rows"], len(state["failed"])) == (0, 4)
    assert list(read_vectors(tmp_path)) == []


def test_a_damaged_or_foreign_file_is_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.parquet"
    assert read_state(path) is None
    pq.write_table(pa.table({"id": ["a"]}), path)
    assert read_state(path) is None
    write(path, "int8")
    path.write_bytes(path.read_bytes()[:-20])
    assert read_state(path) is None
    with pytest.raises(UserError, match="cannot be read"):
        list(read_vectors(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="contains no shard"):
        list(read_vectors(tmp_path))


def test_the_key_is_of_pages_and_files_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    page = Source("a", str(path))
    keys = [Shard(0, [page]).key()]
    assert Shard(9, [page]).key() == keys[0]
    keys += [Shard(0, [page._replace(id="b")]).key(), Shard(0, [page, page]).key()]
    keys.append(Shard(0, [page._replace(page=1)]).key())
    path.write_bytes(b"three")
    keys.append(Shard(0, [page]).key())
    os.utime(path, ns=(1, 1))
    keys.append(Shard(0, [page]).key())
    path.unlink()
    keys.append(Shard(0, [page]).key())
    assert len(set(keys)) == len(keys)
