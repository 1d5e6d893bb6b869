"""Results appear whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from colqwen3.system.errors import UserError
from colqwen3.system.files import fresh_folder, publish_folder, read_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_is_sorted_indented_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"b": 1, "a": {"ä": [0.1, None, True]}})
    assert path.read_bytes().decode("utf-8") == (
        '{\n  "a": {\n    "ä": [\n      0.1,\n      null,\n      true\n    ]\n  },\n  "b": 1\n}\n'
    )
    assert names(path.parent) == ["a.json"]
    assert read_json(path, "") == {"b": 1, "a": {"ä": [0.1, None, True]}}


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "y": {"b": 2.5, "a": 3}})
    write_json(tmp_path / "b", {"y": {"a": 3, "b": 2.5}, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), {1, 2}, b"x"])
def test_what_is_no_json_leaves_the_old_file_alone(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"ok": 1, "value": [value]})
    assert path.read_text() == "1\n"
    assert names(tmp_path) == ["a.json"]


def test_interrupted_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for target in ("os.replace", "pathlib.Path.write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(OSError, match="No space left"):
                write_json(path, {"new": True})
        assert json.loads(path.read_text()) == {"old": True}
        assert names(tmp_path) == ["a.json"]  # what a full disk holds of the new one goes
    write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"new": True}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": 1} x', "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_unreadable_json_is_one_line_with_the_fix(
    tmp_path: Path, data: bytes | None, part: str
) -> None:
    path = tmp_path / "a.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_json(path, "run `make x`")
    said = str(caught.value)
    assert said.startswith(f"{path}: {part}")
    assert said.endswith("; run `make x`")
    assert len(said.splitlines()) == 1


def test_folder_in_place_of_json_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path, "fix it")


def test_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    partial = fresh_folder(path)
    assert partial.is_dir()
    assert partial.parent == path.parent
    assert not path.exists()
    (partial / "sub").mkdir()
    (partial / "sub" / "a").write_text("a")
    publish_folder(partial, path)
    assert names(path.parent) == ["out"]
    assert (path / "sub" / "a").read_text() == "a"


def test_stale_parts_never_reach_the_result(tmp_path: Path) -> None:
    path = tmp_path / "out"
    killed = fresh_folder(path)
    (killed / "half").write_text("half")
    partial = fresh_folder(path)
    assert names(partial) == []
    (partial / "new").write_text("new")
    publish_folder(partial, path)
    again = fresh_folder(path)
    assert names(path) == ["new"], "the old result stays until the new one is published"
    (again / "newer").write_text("newer")
    publish_folder(again, path)
    assert names(path) == ["newer"]
    assert names(tmp_path) == ["out"]


def test_the_place_of_a_result_is_made(tmp_path: Path) -> None:
    publish_folder(fresh_folder(tmp_path / "work"), tmp_path / "new" / "out")
    assert names(tmp_path / "new") == ["out"]


def test_read_only_result_is_replaced(tmp_path: Path) -> None:
    """DVC links outs to its cache and takes away the right to write."""
    path = tmp_path / "out"
    for text in ("old", "new"):
        partial = fresh_folder(path)
        (partial / "a").write_text(text)
        os.chmod(partial / "a", 0o444)
        publish_folder(partial, path)
    assert (path / "a").read_text() == "new"


def test_a_folder_is_published_where_none_was_yet(tmp_path: Path) -> None:
    partial = tmp_path / "scratch"
    partial.mkdir()
    (partial / "new").touch()
    publish_folder(partial, tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == ["new"]
    assert not partial.exists()
