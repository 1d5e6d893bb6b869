"""Single tensors of safetensors files, held against the library's own reader and writer."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.headers import Spec, read_headers
from colqwen3.checkpoint.tensor_file import DTYPES, TensorFile, read_rows, read_tensor, same_bytes
from colqwen3.system.errors import UserError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {
        "z.float": torch.randn(3, 5, generator=generator),
        "b.words": torch.randint(-(2**31), 2**31, (4, 3), generator=generator).int(),
        "y.bf": torch.randn(7, generator=generator).bfloat16(),
        "a.half": torch.randn(2, 2, 3, generator=generator).half(),
        "\u00e9.bf": torch.randn(1, generator=generator).bfloat16(),
    }
    return tensors


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def test_file_equals_the_librarys_in_any_order_of_writing(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        path = tmp_path / "written"
        with TensorFile(path, specs(tensors)) as file:
            for name in order:
                file.write(name, tensors[name])
        assert path.read_bytes() == (tmp_path / "expected").read_bytes()
        path.unlink()


def test_transposed_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3).T
    with TensorFile(tmp_path / "f", {"t": ("F32", (3, 2))}) as file:
        file.write("t", tensor)
    assert torch.equal(load_file(tmp_path / "f")["t"], tensor)


def test_a_file_is_continued_only_with_the_same_header(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = tmp_path / "f"
    with TensorFile(path, specs(tensors)) as file:
        file.write("y.bf", tensors["y.bf"])
    with TensorFile(path, specs(tensors)) as file:
        assert file.read("y.bf") == tensors["y.bf"].view(torch.uint8).numpy().tobytes()
    other = {**specs(tensors), "y.bf": ("F16", (7,))}
    with TensorFile(path, other) as file:
        assert not any(file.read("y.bf"))


def test_announced_dtype_and_shape_are_kept_to(tmp_path: Path) -> None:
    with TensorFile(tmp_path / "f", {"t": ("F32", (2, 3))}) as file:
        for wrong in (torch.zeros(3, 2), torch.zeros(2, 3).half()):
            with pytest.raises(ValueError, match="differs from its spec"):
                file.write("t", wrong)


def test_read_and_copy_give_the_stored_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    stored = read_headers(source)
    result = tmp_path / "result"
    result.mkdir()
    with TensorFile(result / "model.safetensors", specs(tensors)) as file:
        for name, tensor in tensors.items():
            read = read_tensor(source, stored[name])
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
            file.copy(name, source, stored[name])
    actual = load_file(result / "model.safetensors")
    assert all(torch.equal(actual[name], tensor) for name, tensor in tensors.items())
    after = read_headers(result)
    assert all(same_bytes(source, stored[n], result, after[n]) for n in tensors)
    data = bytearray((result / "model.safetensors").read_bytes())
    data[after["y.bf"].start + 3] ^= 16
    (result / "model.safetensors").write_bytes(data)
    assert [n for n in tensors if not same_bytes(source, stored[n], result, after[n])] == ["y.bf"]


def test_truncated_source_is_refused(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(100)}, tmp_path / "model.safetensors")
    tensor = read_headers(tmp_path)["t"]
    assert tensor.nbytes == 4 * math.prod(tensor.shape)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(tensor.start + 200)
    with pytest.raises(UserError, match="is truncated"):
        read_tensor(tmp_path, tensor)
    with (
        TensorFile(tmp_path / "f", {"t": ("F32", (100,))}) as result,
        pytest.raises(UserError, match="is truncated"),
    ):
        result.copy("t", tmp_path, tensor)


def test_rows_may_come_one_part_after_the_other(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    with TensorFile(tmp_path / "written", specs(tensors)) as file:
        for name, tensor in tensors.items():
            for first in reversed(range(0, len(tensor), 2)):
                file.write_rows(name, first, tensor[first : first + 2])
            assert torch.equal(file.tensor(name), tensor)
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = some_tensors()
    with TensorFile(tmp_path / "written", specs(tensors)) as file:
        words = tensors["b.words"]
        for first, rows in ((3, words[:2]), (0, words.float()), (0, words[:, :2]), (0, words[0])):
            with pytest.raises(ValueError, match=r"b\.words: .* does not fit its spec"):
                file.write_rows("b.words", first, rows)


def test_some_rows_of_a_stored_tensor_are_read(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_headers(tmp_path)
    for name, tensor in tensors.items():
        for first in range(len(tensor)):
            for count in range(1, len(tensor) - first + 1):
                rows = read_rows(tmp_path, stored[name], first, count)
                assert torch.equal(rows, tensor[first : first + count])


def test_a_column_is_written_whatever_its_stride(tmp_path: Path) -> None:
    column = torch.arange(6, dtype=torch.float16)[None].T.contiguous()  # scales of a single group
    path = tmp_path / "t.safetensors"
    with TensorFile(path, {"a": ("F16", (6, 1)), "b": ("F16", (6, 1))}) as file:
        file.write("a", column)
        file.write_rows("b", 0, column)
    stored = load_file(path)
    assert torch.equal(stored["a"], column) and torch.equal(stored["b"], column)
