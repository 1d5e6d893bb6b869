"""Header reading against the safetensors library, and the damage that it must notice."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint import headers as checkpoint
from colqwen3.checkpoint.fingerprint import check_unchanged, fingerprint, model_files
from colqwen3.checkpoint.headers import INDEX, SINGLE, read_header, read_headers, weight_files
from colqwen3.checkpoint.hub import find_model
from colqwen3.system.errors import UserError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int16, torch.uint16, torch.float16, torch.bfloat16,
    torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64,
]  # fmt: skip
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def refusal(reader: Callable[..., object], *args: object) -> str:
    with pytest.raises(UserError) as caught:
        reader(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def write_raw(
    path: Path, header: object, data: bytes = bytes(4), length: int | None = None
) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a model folder of two shards: a and b in one, c in the other."""
    home = tmp_path / "model"
    home.mkdir()
    shards = {"one.safetensors": ["a", "b"], "two.safetensors": ["c"]}
    for file, names in shards.items():
        save_file({name: torch.arange(6.0).reshape(2, 3) for name in names}, home / file)
    write_index(home, {name: file for file, names in shards.items() for name in names})
    (home / "config.json").write_text("{}")
    return home


def write_index(home: Path, weight_map: object) -> None:
    (home / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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
    found = read_header(path)
    with safe_open(path, framework="pt") as file:
        assert found.keys() == set(file.keys())
        for name, info in found.items():
            piece, tensor = file.get_slice(name), file.get_tensor(name)
            assert info.dtype == piece.get_dtype()
            assert list(info.shape) == piece.get_shape()
            assert info.nbytes == tensor.numel() * tensor.element_size()
            assert info.file == "some.safetensors"
    assert sum(info.nbytes for info in found.values()) < path.stat().st_size


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
    found = read_headers(folder)
    assert {name: info.file for name, info in found.items()} == {
        "a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors",
    }  # fmt: skip
    assert {info.shape for info in found.values()} == {(2, 3)}


# ---- Damaged files ------------------------------------------------------------------------------


def entry(**changes: object) -> dict[str, object]:
    return {**ENTRY, **changes}


DAMAGED: dict[str, tuple[object, bytes, int | None, str]] = {
    "data cut short": ({"a": ENTRY}, bytes(3), None, "bytes, its header says"),
    "data too long": ({"a": ENTRY}, bytes(5), None, "bytes, its header says"),
    "length beyond the file": ({"a": ENTRY}, bytes(4), 10**6, "is truncated or no safetensors"),
    "length of 2**63": ({"a": ENTRY}, bytes(4), 2**63, "is truncated or no safetensors"),
    "length 0": ({"a": ENTRY}, bytes(4), 0, "is truncated or no safetensors"),
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


@pytest.mark.parametrize("kept", [0, 5, 8, 30, -1])
def test_truncated_file_is_refused(folder: Path, kept: int) -> None:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(read_headers, folder).startswith(f"{path}: ")


def test_web_page_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(b"<!DOCTYPE html><html>" + b"not found " * 50)
    assert "no safetensors file" in refusal(read_headers, tmp_path)


def test_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456789\n"
    )
    assert "no safetensors file" in refusal(read_headers, tmp_path)


# ---- Damaged folders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("../x.safetensors", "names '../x.safetensors', which is no file of the folder"),
        ("..", "names '..'"),
        (".", "names '.'"),
        ("", "names ''"),
        ("sub/x.safetensors", "names 'sub/x.safetensors'"),
        ("..\\x.safetensors", "is no file of the folder"),
        ("{outside}", "is no file of the folder"),
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
    assert said.startswith(f"{path}: is a link out of the model folder")


def test_link_to_a_subfolder_or_to_nowhere_is_refused(folder: Path) -> None:
    path = folder / "two.safetensors"
    (folder / "sub").mkdir()
    path.rename(folder / "sub" / path.name)
    path.symlink_to(Path("sub") / path.name)
    assert "is a link out of the model folder" in refusal(read_headers, folder)
    path.unlink()
    path.symlink_to("nowhere")
    assert "is named by the index but missing" in refusal(read_headers, folder)


def test_link_within_the_folder_and_to_the_folder_are_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "two.safetensors").rename(folder / "real.safetensors")
    (folder / "two.safetensors").symlink_to("real.safetensors")
    assert set(read_headers(folder)) == {"a", "b", "c"}
    (tmp_path / "link").symlink_to(folder)
    assert set(read_headers(tmp_path / "link")) == {"a", "b", "c"}


def cache_layout(folder: Path, hub: Path) -> Path:
    """Move a model folder into a Hub cache, as huggingface_hub lays it out."""
    repo, revision = hub / "models--owner--name", "6" * 40
    snapshot = repo / "snapshots" / revision
    for part in (snapshot, repo / "blobs", repo / "refs"):
        part.mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for path in sorted(folder.iterdir()):
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(repo / "blobs" / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


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
    assert "is a link out of the model folder" in refusal(read_headers, snapshot)


def test_blobs_beside_another_folder_are_outside(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "repo" / "versions" / "one"
    home.parent.mkdir(parents=True)
    folder.rename(home)
    (tmp_path / "repo" / "blobs").mkdir()
    (home / "two.safetensors").rename(tmp_path / "repo" / "blobs" / "two")
    (home / "two.safetensors").symlink_to("../../blobs/two")
    assert "is a link out of the model folder" in refusal(read_headers, home)


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
            "names d, which no file holds",
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
        f"{folder / 'two.safetensors'}: holds b, which one.safetensors holds too"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n.")
    said = refusal(read_headers, tmp_path)
    assert said.startswith(f"{tmp_path}: holds only pickled weights")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    said = refusal(read_headers, tmp_path)
    assert said.startswith(f"{tmp_path}: holds neither {INDEX} nor {SINGLE}")


# ---- Fingerprints -------------------------------------------------------------------------------


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
    monkeypatch.setattr(checkpoint, "WHOLE_DIGEST_LIMIT", 99_999)
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
    monkeypatch.setattr(checkpoint, "WHOLE_DIGEST_LIMIT", 10_000)
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


# ---- Finding ------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty Hub cache of a machine without network."""
    home = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def test_local_folder_is_taken_as_it_is(folder: Path, hub: Path) -> None:
    assert find_model(str(folder), None) == folder
    assert find_model("model", "6" * 40) == Path("model")
    (hub.parent / "owner" / "name").mkdir(parents=True)
    assert find_model("owner/name", None) == Path("owner/name")


@pytest.mark.parametrize(
    "source",
    [
        "gone",
        "a/../b",
        "../b/c",
        "a/b/c",
        "/gone",
        "a//b",
        "a/..",
        "a b/c",
        "https://x/y",
        "a/" + "b" * 300,
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(hub: Path, source: str) -> None:
    said = refusal(find_model, source, None)
    assert said == f"{source}: no such folder; give a model folder or a Hub id (owner/name)"


def test_file_is_no_model_folder(folder: Path) -> None:
    assert "no such folder" in refusal(find_model, str(folder / "config.json"), None)


@pytest.mark.parametrize("source", ["owner/name", "-a/b", "é/b", "a/b.git"])
@pytest.mark.parametrize("revision", [None, "6" * 40])
def test_hub_id_without_network_is_one_line(hub: Path, source: str, revision: str | None) -> None:
    said = refusal(find_model, source, revision)
    assert said.startswith(source + (f" at revision {revision}" if revision else ""))
    assert "the Hub cannot give it" in said


def test_cached_snapshot_is_found_without_network(folder: Path, hub: Path) -> None:
    snapshot = cache_layout(folder, hub)
    for revision in ("6" * 40, None, "main"):
        assert find_model("owner/name", revision) == snapshot
    assert set(read_headers(find_model("owner/name", None))) == {"a", "b", "c"}
    assert "cannot give it" in refusal(find_model, "owner/name", "7" * 40)


@pytest.mark.parametrize("trust", [False, True])
def test_python_files_are_fetched_for_those_who_trust_them(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_model("owner/name", "6" * 40, trust) == tmp_path
    assert (asked["repo"], asked["revision"]) == ("owner/name", "6" * 40)
    wanted = asked["allow_patterns"]
    assert ("*.py" in wanted) == trust
    assert {"*.json", "*.safetensors"} <= set(wanted)
    assert not {"*", "*.bin", "*.pt", "*.pth"} & set(wanted)


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


@pytest.mark.parametrize(
    ("source", "revision"), [("x" * 5000, None), ("a\nb", None), ("a/b", "x\ny"), ("", None)]
)
def test_odd_source_is_one_line(hub: Path, source: str, revision: str | None) -> None:
    assert refusal(find_model, source, revision)


def test_header_in_utf_16_is_refused_as_the_library_refuses_it(tmp_path: Path) -> None:
    path = write_raw(tmp_path / SINGLE, json.dumps({"a": ENTRY}).encode("utf-16"))
    with pytest.raises(SafetensorError):
        load_file(path)
    assert refusal(read_header, path)
