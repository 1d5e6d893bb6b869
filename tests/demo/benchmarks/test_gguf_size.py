"""The benchmark of GGUF at true size, run on the sizes of the demo."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from colqwen3.checkpoint.packing import dequantize
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json
from demo.benchmarks import gguf_size
from demo.benchmarks.measure import Usage

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
CONFIG = Path("demo/model/config.json")


def test_linears_are_zeros_and_nothing_is_missing(tmp_path: Path) -> None:
    config = read_json(CONFIG, "")
    gguf_size.write_checkpoint(tmp_path / "model", config)
    tensors = load_file(tmp_path / "model/model.safetensors")
    packed = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(packed) == 7 * config["text_config"]["num_hidden_layers"]
    for name in packed:
        parts = [tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        weight = dequantize(parts[0], parts[1], parts[2], gguf_size.BITS)
        assert torch.equal(weight, torch.zeros_like(weight))


def test_the_command_writes_bytes_time_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gguf_size", "--config", str(CONFIG), "--out", str(out)])
    gguf_size.main()
    results = json.loads(out.read_text())
    assert results["weights"] == "zeros, shapes of demo/model/config.json, 4 bits"
    assert results["command"].endswith(f"gguf_size --config {CONFIG} --out {out}")
    # headers and the vocabulary are not foretold
    assert 0 < sum(results["bytes"].values()) - results["expected_tensor_bytes"] < 1_000_000
    assert results["queries"]["seconds_per_query"] >= 0
    for step in ("convert", "queries"):
        assert results[step]["peak_resident_bytes"] >= results[step]["peak_own_bytes"] > 0


def test_a_child_that_fails_is_told_with_its_output() -> None:
    with pytest.raises(UserError, match="a step failed: no room"):
        gguf_size.describe(Usage(1.0, 1, 1, 1, "no room", {}))
