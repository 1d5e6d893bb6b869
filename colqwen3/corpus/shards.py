"""Shards of a collection's vectors: Parquet files that say in themselves what they are of.

A shard has one row per page: ``id``, ``source`` (the file), ``page`` (of a PDF, else null),
``model``, ``recipe``, and ``vectors``, a list of fixed-size lists of float32, float16, int8 or, for
binary vectors, bytes of eight signs; ``scales`` beside int8. Pages that could not be embedded are
in the file's metadata with the reason, so that one rename makes a shard whole.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colqwen3.corpus.formats import DTYPES, Encoded, Kind
from colqwen3.corpus.parquet import parquet
from colqwen3.corpus.sources import Source
from colqwen3.dataset.pages import Page
from colqwen3.system.errors import UserError
from colqwen3.system.files import write_file

METADATA = b"colqwen3"
PATTERN = "shard-*.parquet"


@dataclass(frozen=True)
class Shard:
    """What one file is to hold.

    Attributes
    ----------
    number
        Its place in the collection.
    pages
        Its pages.
    """

    number: int
    pages: Sequence[Source]

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"shard-{self.number:06d}.parquet"

    def key(self) -> str:
        """Return a SHA-256 of the pages as they are now: what they are, and the files' size and time."""
        digest = hashlib.sha256()
        stats: dict[str, Any] = {}
        for page in self.pages:
            if page.path not in stats:
                stats[page.path] = _stat(page.path)
            digest.update(json.dumps([*page, stats[page.path]]).encode())
        return digest.hexdigest()


def _stat(path: str) -> list[int] | None:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def write_shard(
    path: Path,
    shard: Shard,
    key: str,
    pages: Mapping[str, Encoded | UserError],
    kind: Kind,
    width: int,
    model: str,
    recipe: str | None,
) -> None:
    """Write a shard, by rename; equal input gives equal bytes.

    Parameters
    ----------
    path
        The file.
    shard, key
        What it holds, and its `Shard.key`.
    pages
        The vectors of each page by id, or why it has none.
    kind, width
        Of the vectors: the numbers, and how many of them the file has per vector.
    model, recipe
        Digests of the model, and of how it was quantized.
    """
    import pyarrow as pa

    good = [(page, value) for page in shard.pages
            if isinstance(value := pages[page.id], Encoded)]  # fmt: skip
    failed = [
        {"id": page.id, "source": page.path, "page": page.page, "reason": str(pages[page.id])}
        for page in shard.pages
        if isinstance(pages[page.id], UserError)
    ]
    lengths = [len(value.values) for _, value in good]
    ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    dtype = np.dtype(DTYPES[kind])
    numbers = pa.from_numpy_dtype(dtype)
    vector = pa.list_(pa.field("element", numbers, nullable=False), width)
    values = [value.values for _, value in good]
    flat = np.concatenate(values) if values else np.empty((0, width), dtype)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), type=vector)
    columns = {
        "id": (pa.array([page.id for page, _ in good], pa.string()), False),
        "source": (pa.array([page.path for page, _ in good], pa.string()), False),
        "page": (pa.array([page.page for page, _ in good], pa.int32()), True),
        "model": (pa.array([model] * len(good), pa.string()), False),
        "recipe": (pa.array([recipe] * len(good), pa.string()), True),
        "vectors": (pa.ListArray.from_arrays(ends, vectors, type=_list_of(pa, vector)), False),
    }
    if kind == "int8":
        scales = [value.scales for _, value in good if value.scales is not None]
        flat_scales = pa.array(np.concatenate(scales) if scales else np.empty(0, np.float16))
        columns["scales"] = (
            pa.ListArray.from_arrays(ends, flat_scales, type=_list_of(pa, pa.float16())),
            False,
        )
    schema = pa.schema(
        [pa.field(name, array.type, nullable=null) for name, (array, null) in columns.items()],
        {METADATA: json.dumps({"key": key, "failed": failed}, sort_keys=True).encode()},
    )
    table = pa.Table.from_arrays([array for array, _ in columns.values()], schema=schema)
    sink = pa.BufferOutputStream()
    texts = ["id", "source", "model", "recipe"]
    # neither compression nor statistics tell anything of vectors, and both take time
    parquet().write_table(
        table, sink, compression="none", use_dictionary=texts, write_statistics=False
    )
    write_file(path, sink.getvalue().to_pybytes())


def _list_of(pa: Any, element: Any) -> Any:
    return pa.list_(pa.field("element", element, nullable=False))


def read_state(path: Path) -> dict[str, Any] | None:
    """Return ``key``, ``failed`` and the number of ``rows`` of a shard; None if there is none.

    A damaged file counts as none.
    """
    try:
        metadata = parquet().read_metadata(path)
        state = json.loads(metadata.metadata[METADATA])
        return {"key": state["key"], "failed": list(state["failed"]), "rows": metadata.num_rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_sources(folder: Path) -> dict[str, Page]:
    """Return where each page of a folder of shards comes from, by id."""
    pages = {}
    for path in sorted(folder.glob(PATTERN)):
        table = parquet().read_table(path, columns=["id", "source", "page"])
        for row in table.to_pylist():
            pages[row["id"]] = Page(Path(row["source"]), row["page"])
    return pages


def read_vectors(folder: Path) -> Iterator[tuple[str, Encoded]]:
    """Yield id and stored vectors of every page of a folder of shards, in order.

    Raises
    ------
    UserError
        If there is no shard, or one is damaged.
    """
    files = sorted(folder.glob(PATTERN))
    if not files:
        raise UserError(f"{folder}: contains no {PATTERN}; run `colqwen3 embed-corpus`")
    for path in files:
        try:
            table = parquet().read_table(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); run the command again") from None
        ids = table["id"].to_pylist()
        arrays = {
            name: table[name].combine_chunks()
            for name in ("vectors", "scales")
            if name in table.column_names
        }
        for row, id_ in enumerate(ids):
            vectors = arrays["vectors"][row].values
            width = vectors.type.list_size
            values = vectors.flatten().to_numpy().reshape(-1, width)
            scales = arrays["scales"][row].values.to_numpy() if "scales" in arrays else None
            yield id_, Encoded(values, scales)
