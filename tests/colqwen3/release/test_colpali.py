"""The export for colpali-engine: names and config as its class has them, weights untouched.

`make check-release` loads it in that library.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from colqwen3.release.colpali import export_colpali
from colqwen3.release.projection import write_released
from colqwen3.system.errors import UserError
from tests.helpers.widened import widen

DEMO = Path("demo/model")


def export(source: Path, target: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    target.mkdir()
    export_colpali(source, target)
    config = json.loads((target / "config.json").read_text())
    return load_file(target / "model.safetensors"), config


def test_an_original_has_the_names_of_qwen3_vl_and_a_projection(tmp_path: Path) -> None:
    source = widen(DEMO, tmp_path / "wide")
    tensors, config = export(source, tmp_path / "out")
    with torch.device("meta"):
        loaded: Any = AutoConfig.from_pretrained(tmp_path / "out")
        expected = Qwen3VLModel(loaded).state_dict()  # what that class derives from
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    shapes |= {"custom_text_proj.weight": (320, 256), "custom_text_proj.bias": (320,)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(shape) for name, shape in shapes.items()
    }
    before = load_file(source / "model.safetensors")
    assert len(before) == len(tensors)
    for name, tensor in before.items():
        short = name.replace("vlm.model.", "").replace("embedding_proj_layer", "custom_text_proj")
        assert torch.equal(tensor, tensors[short])
    assert config["model_type"] == "qwen3_vl"
    assert not {"embed_dim", "vector_dim", "auto_map"} & config.keys()


def test_a_quantized_folder_names_its_blocks_anew_from_either_layout(
    workspace: Path, tmp_path: Path
) -> None:
    published = widen(workspace / "artifacts/checkpoints/rtn-w4g128", tmp_path / "wide")
    released = tmp_path / "released"
    released.mkdir()
    write_released(published, released)
    results = [export(folder, tmp_path / f"{folder.name}-out") for folder in (published, released)]
    for tensors, config in results:
        assert config["quantization_config"]["block_name_to_quantize"] == "language_model.layers"
        assert any(name.startswith("language_model.layers.0.mlp.up_proj.q") for name in tensors)
        assert not any("guard" in name or "before" in name for name in tensors)
    (first, _), (second, _) = results
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_that_class_cannot_hold_is_rejected_by_name(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"vectors have 128 numbers; colpali-engine's .* has 320"):
        export_colpali(DEMO, out)
    packed = widen(workspace / "artifacts/checkpoints/rtn-w4g128", tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quant_method is 'gptq'.*folder of format auto_round"):
        export_colpali(packed, out)
    assert not any(out.iterdir())
