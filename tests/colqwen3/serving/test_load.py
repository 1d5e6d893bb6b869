"""Which folders and arguments the loader of the serving runtime refuses, and how."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen3.model.configuration_colqwen3 import ColQwen3Config
from colqwen3.serving import load, load_runtime
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json

MODEL = Path("tests/golden/model")
CPU = torch.device("cpu")


def damaged(folder: Path, tmp_path: Path, name: str, value: float | torch.Tensor | None) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "damaged"))
    tensors = load_file(copy / "model.safetensors")
    if value is None:
        del tensors[name]
    elif isinstance(value, torch.Tensor):
        tensors[name] = value
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vlm.model.language_model.layers.1.mlp.down_proj.qweight", None, "lacks the tensor"),
        ("vlm.model.language_model.norm.weight", None, "lacks the tensor"),
        ("vlm.model.visual.blocks.0.norm1.bias", float("nan"), "holds NaN or infinite"),
        ("vlm.model.language_model.layers.0.mlp.up_proj.scales", float("inf"), "holds NaN or inf"),
    ],
)
def test_damaged_folders_are_one_line(
    quantized: Path, tmp_path: Path, name: str, value: float | None, message: str
) -> None:
    folder = damaged(quantized, tmp_path, name, value)
    with pytest.raises(UserError, match=message) as caught:
        load_runtime(folder, CPU, torch.float32)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["layers.1.self_attn.q_norm", "layers.0.input_layernorm", "norm"])
def test_tensors_that_do_not_fit_are_one_line(quantized: Path, tmp_path: Path, name: str) -> None:
    weight = f"vlm.model.language_model.{name}.weight"
    folder = damaged(quantized, tmp_path, weight, torch.ones(136))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_runtime(folder, CPU, torch.float32)
    assert "\n" not in str(caught.value)


def test_other_packings_are_refused(quantized: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized, tmp_path / "other"))
    config = read_json(folder / "config.json", "")
    config["quantization_config"]["packing_format"] = "auto_round:auto_awq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="packing_format is 'auto_round:auto_awq'"):
        load_runtime(folder, CPU)


def test_other_models_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = read_json(folder / "config.json", "")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl"}))
    with pytest.raises(UserError, match="model_type is 'qwen3_vl'"):
        load_runtime(folder, CPU)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="mode is 'fast'"):
        load_runtime(MODEL, CPU, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_num_visual_tokens is 0"):
        load_runtime(MODEL, CPU, max_num_visual_tokens=0)
    with pytest.raises(ValueError, match="activations is 'float8'; give one of bfloat16, int8"):
        load_runtime(MODEL, CPU, activations="float8")  # type: ignore[arg-type]


CONFIG = ColQwen3Config.from_dict(json.loads((MODEL / "config.json").read_text()))


@pytest.mark.parametrize(
    ("installed", "dtype", "capability", "expected"),
    [
        (("humming", "triton"), torch.bfloat16, (9, 0), None),
        (("humming", "triton"), torch.bfloat16, (10, 0), "and an old card has 10.0"),
        (("triton",), torch.bfloat16, (9, 0), "need humming"),
        (("humming",), torch.bfloat16, (9, 0), "need triton"),
        (("humming", "triton"), torch.float16, (9, 0), "need bfloat16 beside them"),
        (("humming", "triton"), torch.bfloat16, (8, 9), "and an old card has 8.9"),
    ],
)
def test_what_keeps_a_gpu_from_8_bit_activations(
    installed: tuple[str, ...],
    dtype: torch.dtype,
    capability: tuple[int, int],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    problem = load.int8_problem(torch.device("cuda"), dtype, CONFIG)
    assert problem is None if expected is None else expected in str(problem)


def test_linears_whose_inputs_cannot_be_rotated_stay_at_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load, "ROTATED", 1000)
    runtime = load_runtime(MODEL, CPU, torch.float32, activations="int8")
    assert runtime.activations == "bfloat16"
    assert "need 1000 to divide the widths" in caplog.text
    assert "16-bit activations are used" in caplog.text


def test_code_of_the_folder_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    canary = tmp_path / "canary"
    (folder / "tok.py").write_text(
        f"open({str(canary)!r}, 'w').close()\nfrom transformers import Qwen2Tokenizer\n"
        "class Tok(Qwen2Tokenizer):\n    pass\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}, "tokenizer_class": "Tok"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="code of its own runs only with trust_remote_code"):
        load_runtime(folder, CPU, torch.float32)
    assert not canary.exists()
    runtime = load_runtime(folder, CPU, torch.float32, trust_remote_code=True)
    assert canary.exists()
    text = ["total of the year"]
    expected = load_runtime(MODEL, CPU, torch.float32).embed_queries(text)[0]
    torch.testing.assert_close(runtime.embed_queries(text)[0], expected, atol=1e-5, rtol=0)
