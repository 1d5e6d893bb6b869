"""Loading folders that are damaged, foreign or hostile, and the dtype of what is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.model.loading import load_model, load_processor, source_dtype
from colqwen3.system.errors import UserError

GOLDEN = Path("tests/golden/model")
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def test_dtype_is_the_one_asked_for() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(GOLDEN, dtype, CPU)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert not model.training
    assert source_dtype(Checkpoint.read(GOLDEN)) == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(folder: Path, value: float) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinite"):
        load_model(folder, torch.float32, CPU)


def test_other_models_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl"}))
    with pytest.raises(UserError, match=r"config\.json: model_type is 'qwen3_vl'"):
        load_model(folder, torch.float32, CPU)


def test_code_of_the_folder_does_not_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("configuration_colqwen3", "modeling_colqwen3", "processing_colqwen3"):
        (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    load_model(folder, torch.float32, CPU)
    load_processor(folder, 64)
    assert not canary.exists()


def test_a_tokenizer_that_knows_nothing_is_refused(tmp_path: Path) -> None:
    without = shutil.ignore_patterns("tokenizer.json", "*.safetensors")
    folder = Path(shutil.copytree("demo/model", tmp_path / "model", ignore=without))
    with pytest.raises(UserError, match=r"fetch tokenizer\.json again"):
        load_processor(folder, 64)


def test_missing_tokenizer_is_one_line(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match="processor cannot be loaded") as caught:
        load_processor(folder, 64)
    assert "\n" not in str(caught.value)


def test_shape_that_differs_from_config_is_one_line(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "embed_dim": 40}))
    with pytest.raises(UserError, match="model cannot be loaded") as caught:
        load_model(folder, torch.float32, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("quant_method", "gptq"), ("packing_format", "auto_round:auto_awq"), ("bits", None)],
)
def test_other_packings_are_refused_by_name(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    result = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4}
    config["quantization_config"] = {**result, key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"quantization_config\.{key} is"):
        load_model(folder, torch.float32, CPU)
