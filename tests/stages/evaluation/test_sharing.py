from pathlib import Path

import pytest

from colqwen3.dataset.beir import Dataset
from colqwen3.dataset.pages import find_pages
from stages.evaluation.sharing import NOTHING_SHARED, find_shared, normalise


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("Total of 2025", "total  of\t2025 ", True),
        ("\ufb01nal \uff54otal", "final total", True),  # compatibility forms of the same letters
        ("straße", "STRASSE", True),
        ("total of 2025", "total of 2026", False),
        ("total of 2025", "total of2025", False),
    ],
)
def test_texts_are_compared_as_a_reader_does(text: str, other: str, same: bool) -> None:
    assert (normalise(text) == normalise(other)) is same


def dataset(folder: Path, queries: list[str], **pages: bytes) -> Dataset:
    (folder / "corpus").mkdir(parents=True)
    for name, content in pages.items():
        (folder / f"corpus/{name}.png").write_bytes(content)
    lines = [f'{{"_id": "q{number}", "text": "{text}"}}' for number, text in enumerate(queries)]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    texts = {f"q{number}": text for number, text in enumerate(queries)}
    return Dataset(texts, find_pages(folder / "corpus"), {})


def test_pages_are_the_same_by_their_bytes_not_by_their_names(tmp_path: Path) -> None:
    evaluation = dataset(tmp_path / "e", ["one", "two"], a=b"1234", b=b"12345", c=b"4321")
    dataset(tmp_path / "c", ["Two", "three"], a=b"9999", x=b"12345", y=b"12345", z=b"4321")
    assert find_shared(evaluation, tmp_path / "e", tmp_path / "c") == {
        "same_folder": False, "pages": 2, "queries": 1,
    }  # fmt: skip


def test_the_same_folder_is_seen_through_links_and_dots(tmp_path: Path) -> None:
    evaluation = dataset(tmp_path / "e", ["one"], a=b"1")
    (tmp_path / "link").symlink_to("e")
    for name in ("e", "link", "e/../e"):
        assert find_shared(evaluation, tmp_path / "e", tmp_path / name) == {
            "same_folder": True, "pages": 1, "queries": 1,
        }  # fmt: skip


def test_a_calibration_set_of_passages_alone_shares_nothing(tmp_path: Path) -> None:
    evaluation = dataset(tmp_path / "e", ["one"], a=b"1")
    (tmp_path / "c").mkdir()
    assert find_shared(evaluation, tmp_path / "e", tmp_path / "c") == NOTHING_SHARED
