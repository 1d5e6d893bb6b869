"""Every changed byte of a released folder is named, and what could run or lead outside is refused."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from colqwen3.release.provenance import METADATA, seal
from colqwen3.release.verify import verify

WEIGHTS = "model.safetensors"
PROJECTION = "embedding_proj_layer.before_weight.bias"


@pytest.fixture
def folder(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "released"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def place_of(path: Path, tensor: str) -> int:
    """Where the last byte of a tensor lies, by the format's own description."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    end = int(json.loads(data[8 : 8 + length])[tensor]["data_offsets"][1])
    return int(8 + length + end - 1)


def test_a_released_folder_is_as_released(released: Path) -> None:
    assert verify(released)[1] == []


@pytest.mark.parametrize("name", ["README.md", "config.json", "modeling_colqwen3.py", "LICENSE"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_names_its_file(folder: Path, name: str, place: int) -> None:
    flip(folder / name, place)
    assert verify(folder)[1] == [f"{name}: changed"]


def test_a_changed_weight_names_its_tensor(folder: Path) -> None:
    flip(folder / WEIGHTS, place_of(folder / WEIGHTS, PROJECTION))
    assert verify(folder)[1] == [f"{WEIGHTS}: tensor {PROJECTION} changed"]


def test_a_changed_header_is_named(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    changed = data.replace(b'"format":"pt"', b'"format":"tf"', 1)
    assert changed != data
    (folder / WEIGHTS).write_bytes(changed)
    assert verify(folder)[1] == [f"{WEIGHTS}: header changed"]


@pytest.mark.parametrize(
    ("old", "new"), [('"bits": 4', '"bits": 3'), ('"commit"', '"commit" '), ("0", "1")]
)
def test_changed_metadata_are_named(folder: Path, old: str, new: str) -> None:
    text = (folder / METADATA).read_text()
    (folder / METADATA).write_text(text.replace(old, new, 1))
    assert f"{METADATA}: changed" in verify(folder)[1]


def test_truncated_missing_and_added_files_are_named(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data[:-1])
    (folder / "scoring.py").unlink()
    (folder / "extra.py").write_text("")
    (folder / "sub").mkdir()
    (folder / ".gitattributes").write_text("what the Hub adds")
    problems = verify(folder)[1]
    assert [line.split(":")[0] for line in problems] == ["extra.py", WEIGHTS, "scoring.py", "sub"]
    assert "its header says" in problems[1]


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.py"
    shutil.copyfile(folder / "scoring.py", outside)
    (folder / "scoring.py").unlink()
    (folder / "scoring.py").symlink_to(outside)


def pickle_listed(folder: Path) -> None:
    (folder / "scoring.py").write_bytes(b"\x80\x04K\x01.")
    listed = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(json.dumps(seal(listed), indent=2, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    ("change", "problem"),
    [(link_outside, "points outside the folder"), (pickle_listed, "pickled objects")],
)
def test_links_and_pickles_are_refused_whatever_is_listed(
    folder: Path, change: Callable[[Path], None], problem: str
) -> None:
    change(folder)
    assert any(line.startswith("scoring.py") and problem in line for line in verify(folder)[1])


def test_a_listed_path_out_of_the_folder_is_never_read(folder: Path) -> None:
    metadata = json.loads((folder / METADATA).read_text())
    metadata["files"]["../secret"] = {"size": 1, "sha256": "0"}
    (folder.parent / "secret").write_text("x")
    (folder / METADATA).write_text(json.dumps(seal(metadata), indent=2, sort_keys=True) + "\n")
    assert "../secret: missing" in verify(folder)[1]
