"""The measured parts that are no stage, on files whose contents are known."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from colqwen3.checkpoint.headers import read_header
from demo.benchmarks import size_steps
from demo.benchmarks.measure import RESULT


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(RESULT)]
    (line,) = lines
    actual: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return actual


def test_equal_tensors_are_counted_whatever_file_they_lie_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: torch.arange(6.0) + i for i, name in enumerate("abcd")}
    left, right = tmp_path / "left", tmp_path / "right"
    for folder in (left, right):
        folder.mkdir()
    save_file({"a": tensors["a"], "b": tensors["b"]}, left / "1.safetensors")
    save_file({"c": tensors["c"], "d": tensors["d"]}, left / "2.safetensors")
    changed = {"b": -tensors["b"], "c": tensors["c"].view(2, 3), "e": tensors["d"]}
    save_file({"a": tensors["a"], **changed}, right / "model.safetensors")
    size_steps.compare(left, right)
    assert reported(capsys) == {"tensors": 5, "equal": 1}


def test_a_digest_is_that_of_the_tensor_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size_steps, "CHUNK", 5)
    tensors = {"a": torch.arange(7), "b": torch.arange(7, 18)}
    save_file(tensors, tmp_path / "x.safetensors")
    for name, tensor in read_header(tmp_path / "x.safetensors").items():
        want = hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
        assert size_steps.digest(tmp_path, tensor) == want


def test_the_floor_reads_everything_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = Path("demo/model"), tmp_path / "out"
    size_steps.floor(model, out, 0.0201)
    actual = reported(capsys)
    assert actual["read_bytes"] == sum(p.stat().st_size for p in model.glob("*.safetensors"))
    assert actual["written_bytes"] == 20_100_000
    assert not out.exists()


def test_fractions_keep_four_digits() -> None:
    value = {"a": [0.123456, 12345.6], "b": 123456789, "c": True, "d": "x"}
    assert size_steps.rounded(value) == {
        "a": [0.1235, 12350.0],
        "b": 123456789,
        "c": True,
        "d": "x",
    }


def test_the_first_run_warms_up_and_the_rest_are_timed() -> None:
    runs: list[int] = []
    assert 0 <= size_steps.seconds_of(lambda: runs.append(1), 3) < 1
    assert len(runs) == 4
