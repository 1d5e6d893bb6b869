import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from colqwen3.embedding.store import read_embeddings, write_embeddings
from colqwen3.system.errors import UserError

QUERIES = {"z": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([[3.0, 4.0], [5.0, 6.0]])}
PAGES = {"p2": torch.tensor([[7.0, 8.0]]), "p10": torch.tensor([[-1.0, 0.5]])}


def test_reads_back_what_was_written_in_input_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "e.safetensors"
    write_embeddings(path, QUERIES, PAGES)
    stored = read_embeddings(path)
    assert list(stored.queries) == ["z", "a"]
    assert list(stored.pages) == ["p2", "p10"]
    for name, tensor in {**QUERIES, **PAGES}.items():
        assert torch.equal({**stored.queries, **stored.pages}[name], tensor)
    assert [file.name for file in path.parent.iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_is_float32_under_the_documented_keys(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "e.safetensors"
    batch = torch.arange(12, dtype=dtype).reshape(2, 3, 2)
    # views of one batch, as when padding is cut off; one is not contiguous
    queries = {"q": batch[0, 1:], "r": batch[1, 2:]}
    write_embeddings(path, queries, {"p": batch[1].T.requires_grad_()})
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    assert set(header) == {"__metadata__", "query/q", "query/r", "page/p"}
    assert json.loads(header["__metadata__"]["order"]) == {"queries": ["q", "r"], "pages": ["p"]}
    values = {}
    for key in ("query/q", "query/r", "page/p"):
        assert header[key]["dtype"] == "F32"
        begin, end = (8 + size + offset for offset in header[key]["data_offsets"])
        values[key] = (
            header[key]["shape"],
            struct.unpack(f"<{(end - begin) // 4}f", data[begin:end]),
        )
    assert values == {
        "query/q": ([2, 2], (2.0, 3.0, 4.0, 5.0)),
        "query/r": ([1, 2], (10.0, 11.0)),
        "page/p": ([2, 3], (6.0, 8.0, 10.0, 7.0, 9.0, 11.0)),
    }


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    contents = set()
    for _ in range(10):
        write_embeddings(path, QUERIES, PAGES)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("shape", [(2,), (1, 2, 2), (0, 2), (2, 0)])
def test_writes_no_tensor_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens, embed_dim"):
        write_embeddings(tmp_path / "e.safetensors", {"q": torch.zeros(shape)}, PAGES)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_path_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"e.safetensors: cannot be written"):
        write_embeddings(tmp_path / "file" / "e.safetensors", QUERIES, PAGES)


ORDER = {"order": json.dumps({"queries": ["q"], "pages": ["p"]})}
GOOD = {"query/q": torch.ones(2, 2), "page/p": torch.ones(1, 2)}


def write_by_hand(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata=metadata)


def test_reads_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    write_by_hand(path, GOOD, ORDER)
    assert torch.equal(read_embeddings(path).queries["q"], torch.ones(2, 2))


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        (GOOD, {}, "lacks the order"),
        (GOOD, {"order": "[]"}, "lacks the order"),
        (GOOD, {"order": "{"}, "lacks the order"),
        (GOOD, {"order": '{"queries": ["q"]}'}, "lacks the order"),
        ({"query/q": torch.ones(2, 2)}, ORDER, "cannot be read"),
        ({**GOOD, "page/x": torch.ones(1, 2)}, ORDER, "does not name"),
        ({**GOOD, "page/p": torch.ones(1, 2).half()}, ORDER, "in float32, float16 or"),
        ({**GOOD, "page/p": torch.ones(2)}, ORDER, "in float32, float16 or"),
        ({**GOOD, "page/p": torch.ones(0, 2)}, ORDER, "in float32, float16 or"),
    ],
)
def test_refuses_a_file_of_another_kind(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], reason: str
) -> None:
    path = tmp_path / "e.safetensors"
    write_by_hand(path, tensors, metadata)
    with pytest.raises(UserError, match=reason) as caught:
        read_embeddings(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_refuses_a_missing_or_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        read_embeddings(path)
    write_embeddings(path, QUERIES, PAGES)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cannot be read"):
        read_embeddings(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_file_can_be_of_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    vectors = {"a": torch.linspace(-1, 1, 24).reshape(4, 6)}
    write_embeddings(tmp_path / "wide", vectors, vectors)
    write_embeddings(tmp_path / "e", vectors, vectors, dtype=dtype)
    stored = read_embeddings(tmp_path / "e")
    for item in (stored.queries["a"], stored.pages["a"]):
        assert item.dtype == dtype
        assert torch.equal(item, vectors["a"].to(dtype))
    assert (tmp_path / "wide").stat().st_size - (tmp_path / "e").stat().st_size >= 2 * 24 * 2 - 8
