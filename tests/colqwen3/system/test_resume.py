"""Unfinished work is offered again only when nothing that determines it changed."""

import os
from pathlib import Path

import pytest

from colqwen3.system.errors import UserError
from colqwen3.system.files import digest_file, digest_files
from colqwen3.system.resume import Scratch, work_key


def put(scratch: Scratch, name: str, text: str) -> dict[str, str]:
    path = scratch.folder / name
    path.write_text(text)
    return {name: digest_file(path)}


def test_work_goes_on_under_the_same_key(tmp_path: Path) -> None:
    with Scratch(tmp_path / "w", "key") as scratch:
        assert (scratch.steps, scratch.files) == ([], {})
        scratch.record(put(scratch, "a", "inputs"))
        scratch.record(put(scratch, "b", "chain"), {"n": 1})
    with Scratch(tmp_path / "w", "key") as scratch:
        assert scratch.steps == [{"n": 1}]
        assert scratch.files.keys() == {"b"}
        assert not (scratch.folder / "a").exists()  # no longer needed
        assert (scratch.folder / "b").read_text() == "chain"
        scratch.remove()
    with Scratch(tmp_path / "w", "key") as scratch:
        assert scratch.steps == []


@pytest.mark.parametrize("damage", ["key", "file", "missing", "state", "list"])
def test_stale_or_damaged_work_is_deleted(tmp_path: Path, damage: str) -> None:
    with Scratch(tmp_path / "w", "key") as scratch:
        scratch.record(put(scratch, "a", "inputs"), {"n": 1})
    if damage == "file":
        (tmp_path / "w/a").write_text("inputS")
    elif damage == "missing":
        (tmp_path / "w/a").unlink()
    elif damage in ("state", "list"):
        (tmp_path / "w/state.json").write_text('{"key": ' if damage == "state" else "[1]")
    with Scratch(tmp_path / "w", "another" if damage == "key" else "key") as scratch:
        assert (scratch.steps, scratch.files) == ([], {})
        assert not list(scratch.folder.iterdir())


def test_work_in_use_is_refused_and_says_by_whom(tmp_path: Path) -> None:
    with (
        Scratch(tmp_path / "w", "key") as scratch,
        pytest.raises(UserError, match=f"process {os.getpid()} is working on it"),
    ):
        scratch.record(put(scratch, "a", "inputs"), {"n": 1})
        Scratch(tmp_path / "w", "key").__enter__()
    with Scratch(tmp_path / "w", "key") as scratch:  # and nothing was lost
        assert scratch.steps == [{"n": 1}]


def test_keys_tell_any_change_and_no_order() -> None:
    assert work_key({"a": 1, "b": [1, 2]}) == work_key({"b": [1, 2], "a": 1})
    assert work_key({"a": 1}) != work_key({"a": 2})
    assert work_key({"a": 1}) != work_key({"a": 1.5})


def test_digest_of_files_tells_names_and_bytes(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    first = digest_files(tmp_path, tmp_path.iterdir())
    assert first == digest_files(tmp_path, sorted(tmp_path.iterdir(), reverse=True))
    (tmp_path / "a").rename(tmp_path / "c")
    assert digest_files(tmp_path, tmp_path.iterdir()) != first
