"""What a collection consists of: pages of folders, globs, single files and lists, each with an id."""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from colqwen3.corpus.parquet import parquet
from colqwen3.dataset.pages import IMAGES, PDF, Page, count_pages, normalized
from colqwen3.system.errors import UserError

LISTS = (".jsonl", ".parquet")
KEYS = {"path", "page", "id"}


class Source(NamedTuple):
    """One page of a collection.

    Attributes
    ----------
    id
        Unique in the collection.
    path
        The file.
    page
        Which page of a PDF, counted from 1; None for an image.
    problem
        Why the file cannot give pages; then it stands for the whole file. Else None.
    """

    id: str
    path: str
    page: int | None = None
    problem: str | None = None

    @property
    def file_page(self) -> Page:
        """The page as it can be opened."""
        return Page(Path(self.path), self.page)


def find_sources(inputs: Iterable[str]) -> list[Source]:
    """Return the pages of all inputs, in their order.

    A folder gives its images and PDFs, subfolders included, sorted by path, names with a leading
    dot left out; a pattern with ``*``, ``?`` or ``[...]`` (``**`` for any folders) the files that
    match; a ``.jsonl`` or ``.parquet`` file the rows of a list; any other file itself. A row has
    ``path`` (relative to the list), and may have ``page`` (of a PDF, from 1; without it all) and
    ``id``. An id that is not given is the path as given, in Unicode normalisation form C, followed
    for a PDF by ``#page=<number>``.

    Raises
    ------
    UserError
        If an input does not exist or gives no page, a list is malformed, or an id repeats.
    """
    pages: list[Source] = []
    for text in inputs:
        before = len(pages)
        pages += _pages_of(text)
        if len(pages) == before:
            what = "no lines" if Path(text).suffix.lower() in LISTS else "no PNG, JPEG or PDF"
            raise UserError(f"{text}: contains {what}; correct the path")
    seen: set[str] = set()
    for page in pages:
        if page.id in seen:
            raise UserError(
                f"{page.path}: the id {page.id!r} repeats; list a file once, or give ids in a list"
            )
        seen.add(page.id)
    return pages


def _pages_of(text: str) -> Iterator[Source]:
    path = Path(text)
    if path.is_dir():
        for file in _walk(path):
            yield from _file(file)
    elif path.is_file():
        if path.suffix.lower() in LISTS:
            yield from _list(path)
        else:
            yield from _file(text)
    elif glob.has_magic(text):
        for match in sorted(glob.glob(text, recursive=True)):
            if os.path.isfile(match) and _is_page(match):
                yield from _file(match)
    else:
        raise UserError(f"{text}: no such file or folder; correct the path")


def _is_page(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in (*IMAGES, PDF)


def _is_pdf(path: str) -> bool:
    return os.path.splitext(path)[1].lower() == PDF


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files of a folder and its subfolders that are pages by their names, sorted."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); give access to it")

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and _is_page(name):
                yield os.path.join(place, name)


def _file(path: str, id_: str | None = None, page: int | None = None) -> Iterator[Source]:
    """Yield the page or pages of a file."""
    name = normalized(Path(path).as_posix()) if id_ is None else id_
    if not _is_pdf(path):
        yield Source(name, path)
    elif page is not None:
        yield Source(name if id_ is not None else f"{name}#page={page}", path, page)
    else:
        try:
            count = count_pages(Path(path))
        except UserError as error:
            yield Source(name, path, problem=str(error))
        else:
            for number in range(1, count + 1):
                yield Source(f"{name}#page={number}", path, number)


def _list(path: Path) -> Iterator[Source]:
    rows = _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_parquet(path)
    for where, row in rows:
        file, page, id_ = (row.get(key) for key in ("path", "page", "id"))
        if not isinstance(file, str) or not file:
            raise UserError(f"{where}: lacks path; give the path of an image or a PDF")
        if unknown := sorted(row.keys() - KEYS):
            raise UserError(f"{where}: unknown key {unknown[0]!r}; use path, page and id")
        if page is not None and (type(page) is not int or page < 1):
            raise UserError(f"{where}: page is {page!r}; give a whole number from 1")
        if id_ is not None and (not isinstance(id_, str) or not id_.strip()):
            raise UserError(f"{where}: id is {id_!r}; give a text that is not blank")
        if page is not None and not _is_pdf(file):
            raise UserError(f"{where}: page is for PDFs, and {file} is none; leave it out")
        yield from _file(str(path.parent / file), id_, page)


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}: line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: is not valid JSON ({error}); fix it") from None
                if not isinstance(row, dict):
                    raise UserError(f'{where}: is not a JSON object; write {{"path": "a.png"}}')
                yield where, row
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not valid UTF-8; re-save it as UTF-8") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = parquet().ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in KEYS]
        number = 0
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise UserError(
            f"{path}: is not a readable Parquet file ({error}); write it again"
        ) from None
