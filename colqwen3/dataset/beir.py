"""Document sets in the BEIR convention: corpus/ (pages), queries.jsonl, qrels.tsv."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colqwen3.dataset.pages import Page, check_name, find_pages, normalized
from colqwen3.system.errors import UserError

QRELS_HEADER = "query-id\tcorpus-id\tscore"


@dataclass(frozen=True)
class Dataset:
    """Queries, pages, and which pages answer which query.

    Attributes
    ----------
    queries
        Text of each query by its ``_id``, in the order of queries.jsonl.
    pages
        Each page by its id, sorted by file name; see `find_pages`.
    relevance
        Score of each judged page, for every query in the order of `queries`; 0: not relevant.
    """

    queries: dict[str, str]
    pages: dict[str, Page]
    relevance: dict[str, dict[str, int]]


def read_dataset(folder: Path) -> Dataset:
    """Read a whole folder; pages are listed, not drawn.

    Raises
    ------
    UserError
        If a part is missing or wrong; see the readers of the parts.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one in the BEIR convention")
    queries = read_queries(folder / "queries.jsonl")
    pages = find_pages(folder / "corpus")
    return Dataset(queries, pages, read_relevance(folder / "qrels.tsv", queries, pages))


def read_queries(path: Path) -> dict[str, str]:
    """Read queries, one JSON object ``{"_id": ..., "text": ...}`` per line; blank lines are skipped.

    Passages of text are stored in the same way and read by this too. Ids count in Unicode
    normalisation form C.

    Raises
    ------
    UserError
        If a line is not such an object, an id repeats, an id or text is blank, or there is no line.
    """
    queries: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        query = _parse_object(line, where)
        for key in ("_id", "text"):
            if not isinstance(query.get(key), str):
                raise UserError(f'{where}: lacks "{key}" as a string; add it')
        name, text = normalized(query["_id"]), query["text"]
        check_name(name, f"{where}: _id {name!r}")
        if name in lines:
            raise UserError(f"{where}: repeats _id {name!r} of line {lines[name]}; rename one")
        if not text.strip():
            raise UserError(f"{where}: text of {name!r} is blank; write one or remove the line")
        if not _encodable(text):
            raise UserError(
                f"{where}: text of {name!r} contains an unpaired surrogate; fix the \\u escape"
            )
        queries[name], lines[name] = text, number
    if not queries:
        raise UserError(f"{path}: contains no text; write one JSON object per line")
    return queries


def read_relevance(
    path: Path, queries: Collection[str], pages: Collection[str]
) -> dict[str, dict[str, int]]:
    """Read relevance judgements: header ``query-id corpus-id score``, then one per line, separated by tabs.

    Raises
    ------
    UserError
        If the header or a line is malformed, an id is unknown, a pair is judged twice, or a query
        has no page of a score above 0.
    """
    lines = _read_lines(path)
    if lines[0] != QRELS_HEADER:
        raise UserError(f"{path}: line 1: is not the header {QRELS_HEADER!r}; add it")
    relevance: dict[str, dict[str, int]] = {name: {} for name in queries}
    judged: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        fields = line.split("\t")
        if len(fields) != 3:
            raise UserError(f"{where}: has {len(fields)} fields, expected 3; separate them by tabs")
        query, page, score = normalized(fields[0]), normalized(fields[1]), fields[2]
        if query not in relevance:
            raise UserError(f"{where}: query {query!r} is not in queries.jsonl; correct it")
        if page not in pages:
            raise UserError(
                f"{where}: page {page!r} is not in corpus/; give a file name without its ending, "
                "for a PDF followed by - and the page number"
            )
        # trec_eval keeps a counter for every level up to the highest
        if not re.fullmatch("[0-9]{1,4}", score):
            raise UserError(f"{where}: score {score!r} is not a whole number in 0..9999; fix it")
        if (query, page) in judged:
            raise UserError(f"{where}: repeats the pair of line {judged[query, page]}; remove one")
        relevance[query][page], judged[query, page] = int(score), number
    for query, scores in relevance.items():
        if not any(scores.values()):
            raise UserError(f"{path}: query {query!r} has no relevant page; add a line for one")
    return relevance


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their line ends; at least one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); add it, or correct the path"
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {number}: is not valid UTF-8; re-save it as UTF-8") from None
    # str.splitlines would also split at characters that JSON strings may hold
    return [line.removesuffix("\r") for line in text.split("\n")]


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not valid JSON ({error}); fix it") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: is not a JSON object; write {{"_id": "q1", "text": "..."}}')
    return value


def _encodable(text: str) -> bool:
    """Whether a tokenizer can take the text: JSON escapes can contain an unpaired surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
