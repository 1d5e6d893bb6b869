"""Document sets are read whole and in order, and refused by file and line."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from colqwen3.dataset.beir import read_dataset, read_queries, read_relevance
from tests.helpers.refusal import refusal

QRELS = "query-id\tcorpus-id\tscore\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    for name in ("b.png", "a.jpg", "c.d.JPEG"):
        Image.new("RGB", (8, 6), "white").save(tmp_path / "corpus" / name)
    (tmp_path / "queries.jsonl").write_text(
        '{"_id": "q2", "text": "zwei Äpfel"}\n\n{"_id": "q1", "text": "one", "more": 1}\n',
        encoding="utf-8",
    )
    (tmp_path / "qrels.tsv").write_text(QRELS + "q1\tb\t1\nq1\ta\t0\nq2\tc.d\t3\nq2\tb\t1\n")
    return tmp_path


def test_reads_a_whole_folder_in_order(folder: Path) -> None:
    dataset = read_dataset(folder)
    assert list(dataset.queries.items()) == [("q2", "zwei Äpfel"), ("q1", "one")]
    assert [(name, page.path.name) for name, page in dataset.pages.items()] == [
        ("a", "a.jpg"),
        ("b", "b.png"),
        ("c.d", "c.d.JPEG"),
    ]
    assert list(dataset.relevance) == ["q2", "q1"]
    assert dataset.relevance == {"q1": {"b": 1, "a": 0}, "q2": {"c.d": 3, "b": 1}}


def test_judges_pages_of_a_pdf_by_number(folder: Path) -> None:
    sheets = [Image.new("RGB", (20, 30)) for _ in range(3)]
    sheets[0].save(folder / "corpus" / "manual.pdf", save_all=True, append_images=sheets[1:])
    with (folder / "qrels.tsv").open("a") as file:
        file.write("q1\tmanual-3\t2\n")
    dataset = read_dataset(folder)
    assert list(dataset.pages) == ["a", "b", "c.d", "manual-1", "manual-2", "manual-3"]
    assert dataset.relevance["q1"] == {"b": 1, "a": 0, "manual-3": 2}
    with (folder / "qrels.tsv").open("a") as file:
        file.write("q1\tmanual-4\t1\n")
    message = refusal(read_dataset, folder)
    assert message.startswith(f"{folder / 'qrels.tsv'}: line 7: page 'manual-4' is not in corpus/")
    assert "page number" in message


def test_reads_files_saved_by_windows(folder: Path) -> None:
    for name in ("queries.jsonl", "qrels.tsv"):
        text = (folder / name).read_text(encoding="utf-8").replace("\n", "\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    dataset = read_dataset(folder)
    assert dataset.queries == {"q2": "zwei Äpfel", "q1": "one"}
    assert dataset.relevance["q2"] == {"c.d": 3, "b": 1}


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text('{"_id": "q", "text": "two\u2028lines"}', encoding="utf-8")
    assert read_queries(path) == {"q": "two\u2028lines"}


@pytest.mark.parametrize("name", ["corpus", "queries.jsonl", "qrels.tsv"])
def test_refuses_a_folder_that_lacks_a_part(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "elsewhere")
    assert refusal(read_dataset, folder).startswith(f"{folder / name}: cannot be read")


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(read_dataset, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "is not valid JSON"),
        pytest.param("[" * 100_000 + "]" * 100_000, "is not valid JSON", id="nested deeply"),
        pytest.param('{"_id":' * 50_000, "is not valid JSON", id="objects nested deeply"),
        ('["q3", "text"]', "is not a JSON object"),
        ('{"text": "t"}', 'lacks "_id"'),
        ('{"_id": 3, "text": "t"}', 'lacks "_id"'),
        ('{"_id": "q3"}', 'lacks "text"'),
        ('{"_id": "q3", "text": null}', 'lacks "text"'),
        ('{"_id": "q3", "text": " \\t"}', "text of 'q3' is blank"),
        ('{"_id": "", "text": "t"}', "_id '' is blank"),
        ('{"_id": "q\\t3", "text": "t"}', "unprintable"),
        ('{"_id": "q3", "text": "\\ud800"}', "contains an unpaired surrogate; fix the \\u escape"),
        ('{"_id": "q1", "text": "again"}', "repeats _id 'q1' of line 1"),
        (b'{"_id": "q3", "text": "\xff"}', "is not valid UTF-8; re-save it as UTF-8"),
    ],
)
def test_refuses_a_bad_query_by_line(tmp_path: Path, line: str | bytes, reason: str) -> None:
    path = tmp_path / "queries.jsonl"
    data = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"_id": "q1", "text": "one"}\n\n' + data + b"\n\n\n")
    message = refusal(read_queries, path)
    assert message.startswith(str(path) + ": line 3: ")
    assert reason in message


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_refuses_a_file_without_queries(tmp_path: Path, text: str) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(text)
    assert refusal(read_queries, path).startswith(f"{path}: contains no text")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("q1 p1 1", "has 1 fields"),
        ("q1\tp2\t1\tx", "has 4 fields"),
        ("q9\tp2\t1", "query 'q9' is not in queries.jsonl"),
        ("q1\tp2.png\t1", "page 'p2.png' is not in corpus/"),
        ("q1\tp2\t-1", "score '-1'"),
        ("q1\tp2\t1.0", "score '1.0'"),
        ("q1\tp2\t", "score ''"),
        ("q1\tp2\t10000", "score '10000'"),
        ("q1\tp1\t2", "repeats the pair of line 2"),
    ],
)
def test_refuses_a_bad_judgement_by_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text(f"{QRELS}q1\tp1\t1\n\n{line}\n")
    message = refusal(read_relevance, path, ["q1"], ["p1", "p2"])
    assert message.startswith(f"{path}: line 4: ")
    assert reason in message


@pytest.mark.parametrize("text", ["", "q1\tp1\t1\n", "query-id corpus-id score\nq1\tp1\t1\n"])
def test_refuses_qrels_without_the_header(tmp_path: Path, text: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text(text)
    message = refusal(read_relevance, path, ["q1"], ["p1"])
    assert message.startswith(f"{path}: line 1: is not the header")


@pytest.mark.parametrize("lines", ["", "q2\tp1\t0\n"])
def test_refuses_a_query_without_a_relevant_page(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text(f"{QRELS}q1\tp1\t1\n{lines}")
    assert "query 'q2' has no relevant page" in refusal(read_relevance, path, ["q1", "q2"], ["p1"])


FORMS = ("NFC", "NFD")


@pytest.mark.parametrize("on_disk", FORMS)
@pytest.mark.parametrize("in_qrels", FORMS)
def test_names_match_in_either_form_of_unicode(
    folder: Path, on_disk: Literal["NFC", "NFD"], in_qrels: Literal["NFC", "NFD"]
) -> None:
    """macOS and some archivers spell é as e and an accent."""
    normalize = unicodedata.normalize
    Image.new("L", (4, 4)).save(folder / "corpus" / normalize(on_disk, "résumé.png"))
    with (folder / "queries.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"_id": normalize(on_disk, "año"), "text": "t"}) + "\n")
    with (folder / "qrels.tsv").open("a", encoding="utf-8") as file:
        file.write(normalize(in_qrels, "año\trésumé\t1\n"))
    dataset = read_dataset(folder)
    assert dataset.relevance["año"] == {"résumé": 1}
    page = dataset.pages["résumé"]
    assert page.path.exists()
    assert page.name == normalize(on_disk, "résumé.png")  # the file keeps its name


def test_names_that_differ_by_their_form_alone_are_refused(folder: Path) -> None:
    for form in FORMS:
        path = folder / "corpus" / unicodedata.normalize(form, "é.png")  # type: ignore[arg-type]
        Image.new("L", (4, 4)).save(path)
    if len(list((folder / "corpus").iterdir())) == 5:  # a disk of macOS keeps only one
        assert "has the same id as" in refusal(read_dataset, folder)
    ids = [unicodedata.normalize(form, "é") for form in FORMS]  # type: ignore[arg-type]
    path = folder / "queries.jsonl"
    path.write_text("".join(json.dumps({"_id": name, "text": "t"}) + "\n" for name in ids))
    assert "line 2: repeats _id 'é' of line 1" in refusal(read_queries, path)


def test_needs_no_torch() -> None:
    code = "import sys, colqwen3.dataset.beir; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
