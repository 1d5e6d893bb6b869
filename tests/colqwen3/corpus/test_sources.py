"""What a collection consists of: found in every form of input, each page with one id."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from colqwen3.corpus.sources import Source, find_sources
from colqwen3.dataset.pages import open_page
from colqwen3.system.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    sheets = [Image.new("L", (64, 64 + 32 * number)) for number in range(3)]
    for name in ("in/b/2.png", "in/a/1.JPG", "in/.hidden/x.png", "in/.x.png", "other/z.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sheets[0].save(path)
    (tmp_path / "in/notes.txt").write_text("no page")
    sheets[0].save(tmp_path / "in/m.pdf", save_all=True, append_images=sheets[1:])
    (tmp_path / "in/n.pdf").write_bytes(b"%PDF-1.4 cut")
    return tmp_path


def test_a_folder_gives_images_and_pages_of_pdfs_in_the_order_of_paths(folder: Path) -> None:
    pages = find_sources(["in"])
    assert [page.id for page in pages] == [
        "in/m.pdf#page=1", "in/m.pdf#page=2", "in/m.pdf#page=3", "in/n.pdf",
        "in/a/1.JPG", "in/b/2.png",
    ]  # fmt: skip
    assert [page.page for page in pages] == [1, 2, 3, None, None, None]
    # a damaged PDF does not end the search
    assert [page.id for page in pages if page.problem] == ["in/n.pdf"]
    assert "in/n.pdf: is damaged, not a PDF, or has no pages" in str(pages[3].problem)
    good = [page for page in pages if not page.problem]
    assert all(open_page(page.file_page).width >= 64 for page in good)


def test_patterns_files_and_folders_come_in_the_order_given(folder: Path) -> None:
    pages = find_sources(["other", "in/**/*.png", "in/a/1.JPG"])
    assert [page.id for page in pages] == ["other/z.png", "in/b/2.png", "in/a/1.JPG"]
    with pytest.raises(UserError, match=r"the id 'in/b/2.png' repeats"):
        find_sources(["in", "in/b/*"])


ROWS = [
    {"path": "b/2.png", "id": "two"},
    {"path": "m.pdf", "page": 2, "id": "second"},
    {"path": "m.pdf", "page": 3},
    {"path": "a/1.JPG"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_list_names_pages_beside_itself(folder: Path, kind: str) -> None:
    if kind == "jsonl":
        (folder / "in/list.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS,
            schema=pa.schema([("path", pa.string()), ("page", pa.int64()), ("id", pa.string())])),
            folder / "in/list.parquet")  # fmt: skip
    assert find_sources([f"in/list.{kind}"]) == [
        Source("two", "in/b/2.png"),
        Source("second", "in/m.pdf", 2),
        Source("in/m.pdf#page=3", "in/m.pdf", 3),
        Source("in/a/1.JPG", "in/a/1.JPG"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2: is not valid JSON"),
        ("[]", "line 2: is not a JSON object"),
        ('{"id": "x"}', "line 2: lacks path"),
        ('{"path": "a.png", "page": 0}', "line 2: page is 0; give a whole number from 1"),
        ('{"path": "a.png", "page": true}', "line 2: page is True"),
        ('{"path": "a.png", "id": " "}', "line 2: id is ' '"),
        ('{"path": "a.png", "pages": 1}', "line 2: unknown key 'pages'"),
        ('{"path": "b/2.png"}', "the id 'in/b/2.png' repeats"),
        (
            '{"path": "a.png", "page": 2}',
            "line 2: page is for PDFs, and a.png is none; leave it out",
        ),
    ],
)
def test_a_malformed_list_is_named_with_its_line(folder: Path, line: str, problem: str) -> None:
    (folder / "in/list.jsonl").write_text('{"path": "b/2.png"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        find_sources(["in/list.jsonl"])
    assert problem in str(caught.value)


def test_inputs_that_give_nothing_are_rejected(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "blank.jsonl").touch()
    for text, problem in (
        ("no", "no: no such file or folder"),
        ("empty", "empty: contains no PNG, JPEG or PDF"),
        ("in/*.gif", "contains no PNG"),
        ("blank.jsonl", "blank.jsonl: contains no lines"),
    ):
        with pytest.raises(UserError, match=problem):
            find_sources([text])
    (folder / "list.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is not a readable Parquet file"):
        find_sources(["list.parquet"])
    (folder / "list.jsonl").write_bytes(b'{"path": "\xff"}')
    with pytest.raises(UserError, match="is not valid UTF-8"):
        find_sources(["list.jsonl"])
