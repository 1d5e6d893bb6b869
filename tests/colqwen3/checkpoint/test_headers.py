"""Header reading against the safetensors library, and the damage that it must notice."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.fingerprint import model_files
from colqwen3.checkpoint.headers import INDEX, SINGLE, read_header, read_headers, weight_files
from tests.helpers.model_folder import cache_layout, write_index
from tests.helpers.refusal import refusal

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int16, torch.uint16, torch.float16, torch.bfloat16,
    torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64,
]  # fmt: skip
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write_raw(
    path: Path, header: object, data: bytes = bytes(4), length: int | None = None
) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


# ---- Reading ------------------------------------------------------------------------------------


def test_header_equals_what_the_library_reads(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(2, 3), (5,), (), (0, 4), (1, 2, 3, 4)]
    tensors = {
        f"{str(dtype).removeprefix('torch.')}.{i}": torch.zeros(shape, dtype=dtype)
        for dtype in DTYPES
        for i, shape in enumerate(shapes)
    }
    path = tmp_path / "some.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    actual = read_header(path)
    with safe_open(path, framework="pt") as file:
        assert actual.keys() == set(file.keys())
        for name, info in actual.items():
            piece, tensor = file.get_slice(name), file.get_tensor(name)
            assert info.dtype == piece.get_dtype()
            assert list(info.shape) == piece.get_shape()
            assert info.nbytes == tensor.numel() * tensor.element_size()
            assert info.file == "some.safetensors"
    assert sum(info.nbytes for info in actual.values()) < path.stat().st_size


def test_file_without_tensors_is_whole(tmp_path: Path) -> None:
    save_file({}, tmp_path / SINGLE)
    assert read_headers(tmp_path) == {}


def test_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / SINGLE)
    save_file({"other": torch.zeros(3)}, tmp_path / "adapter.safetensors")
    assert weight_files(tmp_path) == [tmp_path / SINGLE]
    assert list(read_headers(tmp_path)) == ["a"]


def test_index_decides_which_files_are_read(folder: Path) -> None:
    save_file({"stale": torch.zeros(3)}, folder / SINGLE)
    assert weight_files(folder) == [folder / "one.safetensors", folder / "two.safetensors"]
    actual = read_headers(folder)
    assert {name: info.file for name, info in actual.items()} == {
        "a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors",
    }  # fmt: skip
    assert {info.shape for info in actual.values()} == {(2, 3)}


# ---- Damaged files ------------------------------------------------------------------------------


def entry(**changes: object) -> dict[str, object]:
    return {**ENTRY, **changes}


DAMAGED: dict[str, tuple[object, bytes, int | None, str]] = {
    "data cut short": ({"a": ENTRY}, bytes(3), None, "bytes, its header says"),
    "data too long": ({"a": ENTRY}, bytes(5), None, "bytes, its header says"),
    "length beyond the file": ({"a": ENTRY}, bytes(4), 10**6, "is truncated or not a safetensors"),
    "length of 2**63": ({"a": ENTRY}, bytes(4), 2**63, "is truncated or not a safetensors"),
    "length 0": ({"a": ENTRY}, bytes(4), 0, "is truncated or not a safetensors"),
    "length one short": ({"a": ENTRY}, bytes(4), len(json.dumps({"a": ENTRY})) - 1, "damaged header"),
    "no JSON": (b"\x80\x02}q\x00.", bytes(4), None, "damaged header"),
    "no UTF-8": (b'{"\xff": 1}', bytes(4), None, "damaged header"),
    "no object": ([1], bytes(4), None, "damaged header"),
    "deeply nested": (b"[" * 100_000, bytes(4), None, "damaged header"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", bytes(4), None, "damaged header"),
    "metadata a list": ({"__metadata__": [], "a": ENTRY}, bytes(4), None, "damaged header"),
    "metadata a number": ({"__metadata__": {"n": 1}, "a": ENTRY}, bytes(4), None, "damaged header"),
    "infinity": (b'{"a": {"x": Infinity}}', bytes(4), None, "damaged header"),
    "half a character": (b'{"a": {"x": "\\ud800"}}', bytes(4), None, "damaged header"),
    "entry no object": ({"a": 5}, bytes(4), None, "damaged entry for a"),
    "entry a list": ({"a": []}, bytes(4), None, "damaged entry for a"),
    "entry empty": ({"a": {}}, bytes(4), None, "damaged entry for a"),
    "unknown dtype": ({"a": entry(dtype="F4")}, bytes(4), None, "damaged entry for a"),
    "dtype a list": ({"a": entry(dtype=["F32"])}, bytes(4), None, "damaged entry for a"),
    "shape null": ({"a": entry(shape=None)}, bytes(4), None, "damaged entry for a"),
    "shape too large": ({"a": entry(shape=[2])}, bytes(4), None, "does not fit its bytes"),
    "shape too small": ({"a": entry(data_offsets=[0, 8])}, bytes(8), None, "does not fit its bytes"),
    "shape huge": ({"a": entry(shape=[2**62] * 99)}, bytes(4), None, "does not fit its bytes"),
    "shape negative": ({"a": entry(shape=[-1])}, bytes(4), None, "does not fit its bytes"),
    "shape twice negative": ({"a": entry(shape=[-1, -1])}, bytes(4), None, "does not fit"),
    "shape fractional": ({"a": entry(shape=[1.0])}, bytes(4), None, "does not fit its bytes"),
    "shape true": ({"a": entry(shape=[True])}, bytes(4), None, "does not fit its bytes"),
    "shape NaN": ({"a": entry(shape=[float("nan")])}, bytes(4), None, "damaged header"),
    "three offsets": ({"a": entry(data_offsets=[0, 2, 4])}, bytes(4), None, "damaged entry for a"),
    "offsets turned round": ({"a": entry(data_offsets=[4, 0])}, bytes(4), None, "does not fit"),
    "offset negative": ({"a": entry(data_offsets=[-4, 0])}, bytes(4), None, "does not fit"),
    "overlap": ({"a": ENTRY, "b": ENTRY}, bytes(4), None, "overlap or leave a gap"),
    "partial overlap": (
        {"a": entry(shape=[2], data_offsets=[0, 8]), "b": entry(shape=[2], data_offsets=[4, 12])},
        bytes(12), None, "overlap or leave a gap",
    ),
    "gap before": ({"a": entry(data_offsets=[4, 8])}, bytes(8), None, "overlap or leave a gap"),
    "gap between": (
        {"a": ENTRY, "b": entry(data_offsets=[8, 12])}, bytes(12), None, "overlap or leave a gap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_refused_as_the_library_refuses_it(tmp_path: Path, damage: str) -> None:
    header, data, length, part = DAMAGED[damage]
    path = write_raw(tmp_path / SINGLE, header, data, length)
    with pytest.raises((SafetensorError, OverflowError)):
        load_file(path)
    said = refusal(read_header, path)
    assert said.startswith(f"{path}: ")
    assert part in said
    assert "; fetch the file again" in said


@pytest.mark.parametrize("length", [0, 5, 8, 30, -1])
def test_truncated_file_is_refused(folder: Path, length: int) -> None:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert refusal(read_headers, folder).startswith(f"{path}: ")


def test_web_page_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"<!DOCTYPE html><html>" + b"not found " * 50)
    assert "not a safetensors file" in refusal(read_headers, tmp_path)


def test_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456789\n"
    )
    assert "not a safetensors file" in refusal(read_headers, tmp_path)


# ---- Damaged folders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("../x.safetensors", "names '../x.safetensors', which is not a file of the folder"),
        ("..", "names '..'"),
        (".", "names '.'"),
        ("", "names ''"),
        ("sub/x.safetensors", "names 'sub/x.safetensors'"),
        ("..\\x.safetensors", "is not a file of the folder"),
        ("{outside}", "is not a file of the folder"),
        ("gone.safetensors", "gone.safetensors: is named by the index but missing"),
        (None, "is named by the index but missing"),
        (["one.safetensors"], "is named by the index but missing"),
    ],
)
def test_index_may_name_files_of_the_folder_only(
    folder: Path, tmp_path: Path, name: object, part: str
) -> None:
    outside = tmp_path / "x.safetensors"
    save_file({"c": torch.zeros(2, 3)}, outside)
    (folder / "sub").mkdir()
    save_file({"c": torch.zeros(2, 3)}, folder / "sub" / "x.safetensors")
    if name == "{outside}":
        name = str(outside)
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": name})
    said = refusal(read_headers, folder)
    assert said.startswith(f"{folder}{os.sep}")
    assert part in said


@pytest.mark.parametrize("single", [True, False])
def test_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, single: bool) -> None:
    outside = tmp_path / "elsewhere.safetensors"
    path = folder / (SINGLE if single else "two.safetensors")
    (folder / "two.safetensors").rename(outside)
    path.symlink_to(outside)
    if single:
        (folder / INDEX).unlink()
    said = refusal(read_headers, folder)
    assert said.startswith(f"{path}: is a link to outside the model folder")


def test_link_to_a_subfolder_or_to_nowhere_is_refused(folder: Path) -> None:
    path = folder / "two.safetensors"
    (folder / "sub").mkdir()
    path.rename(folder / "sub" / path.name)
    path.symlink_to(Path("sub") / path.name)
    assert "is a link to outside the model folder" in refusal(read_headers, folder)
    path.unlink()
    path.symlink_to("nowhere")
    assert "is named by the index but missing" in refusal(read_headers, folder)


def test_link_within_the_folder_and_to_the_folder_are_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "two.safetensors").rename(folder / "real.safetensors")
    (folder / "two.safetensors").symlink_to("real.safetensors")
    assert set(read_headers(folder)) == {"a", "b", "c"}
    (tmp_path / "link").symlink_to(folder)
    assert set(read_headers(tmp_path / "link")) == {"a", "b", "c"}


def test_hub_cache_links_to_its_blobs_only(folder: Path, tmp_path: Path) -> None:
    snapshot = cache_layout(folder, tmp_path / "hub")
    assert set(read_headers(snapshot)) == {"a", "b", "c"}
    assert {path.name for path in model_files(snapshot)} == {
        "config.json", "one.safetensors", "two.safetensors", INDEX,
    }  # fmt: skip
    blob = (snapshot / "two.safetensors").resolve()
    blob.rename(tmp_path / "blob")
    (snapshot / "two.safetensors").unlink()
    (snapshot / "two.safetensors").symlink_to(tmp_path / "blob")
    assert "is a link to outside the model folder" in refusal(read_headers, snapshot)


def test_blobs_beside_another_folder_are_outside(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "repo" / "versions" / "one"
    home.parent.mkdir(parents=True)
    folder.rename(home)
    (tmp_path / "repo" / "blobs").mkdir()
    (home / "two.safetensors").rename(tmp_path / "repo" / "blobs" / "two")
    (home / "two.safetensors").symlink_to("../../blobs/two")
    assert "is a link to outside the model folder" in refusal(read_headers, home)


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": "one.safetensors", "c": "two.safetensors"}, "does not name one.safetensors for b"),
        (
            {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
            "does not name one.safetensors for b",
        ),
        (
            dict.fromkeys("ab", "one.safetensors") | dict.fromkeys("cd", "two.safetensors"),
            "names d, which no file contains",
        ),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
        ("one.safetensors", "has no weight_map"),
    ],
)
def test_index_must_agree_with_the_files(folder: Path, weight_map: object, part: str) -> None:
    write_index(folder, weight_map)
    said = refusal(read_headers, folder)
    assert said.startswith(f"{folder / INDEX}: ")
    assert part in said


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"weight_map'])
def test_index_must_be_an_object(folder: Path, text: bytes) -> None:
    (folder / INDEX).write_bytes(text)
    assert refusal(read_headers, folder).startswith(f"{folder / INDEX}: ")


def test_tensor_in_two_shards_is_refused(folder: Path) -> None:
    save_file({"b": torch.ones(2, 3), "c": torch.ones(2, 3)}, folder / "two.safetensors")
    said = refusal(read_headers, folder)
    assert said.startswith(
        f"{folder / 'two.safetensors'}: contains b, which one.safetensors contains too"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n.")
    said = refusal(read_headers, tmp_path)
    assert said.startswith(f"{tmp_path}: contains only pickled weights")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    said = refusal(read_headers, tmp_path)
    assert said.startswith(f"{tmp_path}: contains neither {INDEX} nor {SINGLE}")


@pytest.mark.parametrize("shape", [["ab", 10**30], [[0], 10**30]])
def test_shape_of_texts_is_refused(tmp_path: Path, shape: list[object]) -> None:
    path = write_raw(tmp_path / SINGLE, {"a": entry(shape=shape)})
    assert refusal(read_header, path)


def test_folder_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    assert refusal(read_headers, tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "two\nlines"])
def test_odd_file_name_in_the_index_is_one_line(folder: Path, name: str) -> None:
    write_index(folder, {"a": name})
    assert refusal(read_headers, folder)


def test_odd_tensor_name_is_one_line(tmp_path: Path) -> None:
    path = write_raw(tmp_path / SINGLE, {"two\nlines": entry(dtype="F4")})
    assert refusal(read_header, path)


def test_deeply_nested_index_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text("[" * 100_000)
    assert refusal(read_headers, folder)


def test_header_in_utf_16_is_refused_as_the_library_refuses_it(tmp_path: Path) -> None:
    path = write_raw(tmp_path / SINGLE, json.dumps({"a": ENTRY}).encode("utf-16"))
    with pytest.raises(SafetensorError):
        load_file(path)
    assert refusal(read_header, path)
