"""Fingerprints notice any change of a small file, and damage of some length in a large one."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from colqwen3.checkpoint import fingerprint as fingerprint_module
from colqwen3.checkpoint.fingerprint import check_unchanged, fingerprint, model_files
from tests.helpers.refusal import refusal


def test_small_file_is_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    data = bytearray(os.urandom(100_000))
    path.write_bytes(data)
    assert fingerprint(path) == {"size": 100_000, "sha256": hashlib.sha256(data).hexdigest()}
    before = fingerprint(path)
    for position in (0, 54_321, 99_999):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert fingerprint(path) != before
    path.write_bytes(data)
    assert fingerprint(path) == before


def test_large_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "WHOLE_DIGEST_LIMIT", 99_999)
    path = tmp_path / "model.safetensors"
    size = 500_000
    data = os.urandom(size)
    path.write_bytes(data)
    before = fingerprint(path)
    assert before.keys() == {"size", "sampled_sha256"}
    assert before["size"] == size
    step = size // 63
    # both ends by a byte, and any damage as long as a step wherever it lies
    damages = [(0, 1), (size - 1, 1), *((i * step // 2, step) for i in range(125))]
    for start, length in damages:
        changed = bytearray(data)
        changed[start : start + length] = bytes(b ^ 255 for b in data[start : start + length])
        path.write_bytes(changed)
        assert fingerprint(path) != before, f"{length} bytes at {start}"
    path.write_bytes(data)
    assert fingerprint(path) == before
    path.write_bytes(data + b"\0")
    assert fingerprint(path) != before


def test_limit_itself_is_hashed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "WHOLE_DIGEST_LIMIT", 10_000)
    (tmp_path / "a").write_bytes(bytes(10_000))
    (tmp_path / "b").write_bytes(bytes(10_001))
    assert "sha256" in fingerprint(tmp_path / "a")
    assert "sampled_sha256" in fingerprint(tmp_path / "b")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "one bit": ("two.safetensors", flip_a_byte),
    "removed": ("config.json", Path.unlink),
    "added": ("tokenizer.json", Path.touch),
    "added code": ("modeling.py", Path.touch),
    "truncated": ("one.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_folder_is_noticed(folder: Path, change: str) -> None:
    name, apply = CHANGES[change]
    files: Mapping[str, Any] = {path.name: fingerprint(path) for path in model_files(folder)}
    recorded = json.loads(json.dumps(files))  # as the manifest holds it
    check_unchanged(folder, recorded)
    apply(folder / name)
    said = refusal(check_unchanged, folder, recorded)
    assert said.startswith(f"{folder / name}: changed since it was inspected; run `dvc repro")


def test_files_that_make_no_model_may_change(folder: Path) -> None:
    recorded = {path.name: fingerprint(path) for path in model_files(folder)}
    (folder / "README.md").write_text("new")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    check_unchanged(folder, recorded)
