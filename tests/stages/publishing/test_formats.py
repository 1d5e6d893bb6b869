"""Other formats hold the same weights, decoded here bit by bit as their own documents describe them.

`tests/slow/check_release.py` reloads them by the libraries that own them.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from colqwen3.checkpoint.layout import EMBEDDINGS, linears, vision_linears, vision_part
from colqwen3.checkpoint.packing import PACKED_TENSORS, dequantize
from stages.publishing.formats import export_weights
from stages.quantization.allocation import Allocation
from tests.helpers.by_hand import dense_linear
from tests.helpers.rounded import allocated

LINEAR = "vlm.model.language_model.layers.1.mlp.down_proj"
BITS = 4


@pytest.fixture(scope="module")
def checkpoint(workspace: Path) -> Path:
    return workspace / "artifacts/checkpoints/rtn-w4g128"


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    tensors = load_file(checkpoint / "model.safetensors")
    qweight, zeros, scales = (tensors[f"{LINEAR}.{part}"] for part in PACKED_TENSORS)
    return dequantize(qweight, zeros, scales, BITS)


def export(checkpoint: Path, folder: Path, kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    export_weights(checkpoint, folder, kind)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config["quantization_config"]


def unpack(word: int) -> list[int]:
    """The eight values of a 32-bit word, the lowest bits first."""
    return [(word >> (BITS * place)) & (2**BITS - 1) for place in range(32 // BITS)]


def others(tensors: dict[str, torch.Tensor], parts: tuple[str, ...]) -> set[str]:
    return {name for name in tensors if not name.endswith(parts)}


def test_compressed_tensors_hold_the_same_weights(
    checkpoint: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    tensors, config = export(checkpoint, tmp_path, "llm_compressor")
    packed, scales = (tensors[f"{LINEAR}.weight_{part}"] for part in ("packed", "scale"))
    assert tensors[f"{LINEAR}.weight_shape"].tolist() == list(expected.shape)
    for row in (0, 100, 255):
        codes = [code - 8 for word in packed[row].tolist() for code in unpack(word)]
        scale = scales[row].float().repeat_interleave(128)
        assert torch.equal(torch.tensor(codes) * scale, expected[row])
    group = config["config_groups"]["group_0"]
    assert (config["format"], group["weights"]["group_size"]) == ("pack-quantized", 128)
    (target,) = group["targets"]
    matching = re.compile(target.removeprefix("re:"))
    quantized = {name[: -len(".weight_packed")] for name in tensors if name.endswith("_packed")}
    dense = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    assert len(quantized) == 28
    assert all(matching.match(name) for name in quantized)
    assert not any(matching.match(name) for name in dense)


def test_gptq_holds_the_same_weights(
    checkpoint: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    tensors, config = export(checkpoint, tmp_path, "auto_gptq")
    qweight, zeros, scales, groups = (
        tensors[f"{LINEAR}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    for column in (0, 100, 255):
        codes = [code for word in qweight[:, column].tolist() for code in unpack(word)]
        # the first version of the format stores zero points minus one
        zero = [unpack(row[column // 8])[column % 8] + 1 for row in zeros.tolist()]
        decoded = [
            (code - zero[group]) * float(scales[group, column])
            for code, group in zip(codes, groups.tolist(), strict=True)
        ]
        assert torch.equal(torch.tensor(decoded), expected[column])
    assert config["checkpoint_format"] == "gptq"
    assert config == json.loads((tmp_path / "quantize_config.json").read_text())
    # gptqmodel leaves out what a pattern of `dynamic` matches
    patterns = [key.removeprefix("-:") for key in config["dynamic"]]
    for name in tensors:
        packed = name.endswith(("qweight", "qzeros", "scales", "g_idx"))
        vision = "visual" in name or "embedding_proj" in name
        assert any(re.match(pattern, name) for pattern in patterns) == vision
        assert not (packed and vision)


def test_compressed_tensors_have_a_group_for_every_width(tmp_path: Path) -> None:
    source = json.loads(Path("demo/model/config.json").read_text())
    bits: dict[str, int] = dict.fromkeys(linears(source), 4)
    bits |= {name: 8 for name in linears(source) if ".layers.1." in name}
    bits |= {name: 8 for name in vision_linears(source) if vision_part(name) == "attention"}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    allocated(Path("demo/model"), checkpoint, Allocation(bits, 8))
    (tmp_path / "out").mkdir()
    tensors, config = export(checkpoint, tmp_path / "out", "llm_compressor")
    groups = config["config_groups"].values()
    assert sorted(group["weights"]["num_bits"] for group in groups) == [4, 8]
    dense = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    for group in groups:
        patterns = [re.compile(target.removeprefix("re:")) for target in group["targets"]]
        width = group["weights"]["num_bits"]
        for module in bits.keys() | dense:
            # other engines leave out the first part of a name, and vLLM says language_model.model
            short = module.removeprefix("vlm.model.")
            served = short.replace("language_model.", "language_model.model.")
            for name in (module, short, served):
                matched = any(pattern.match(name) for pattern in patterns)
                assert matched == (bits.get(module) == width), (name, width)
    # the codes of a linear in 8 bits, four in a word
    name = next(name for name in bits if bits[name] == 8)
    before = load_file(checkpoint / "model.safetensors")
    packed, scales = (tensors[f"{name}.weight_{part}"] for part in ("packed", "scale"))
    codes = packed.numpy().view("uint8").astype("float32") - 128
    steps = scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(
        torch.from_numpy(codes) * steps, torch.from_numpy(dense_linear(before, name, 8))
    )
    for part in ("weight_packed", "weight_scale"):  # the table is not theirs
        assert torch.equal(tensors[f"{EMBEDDINGS}.{part}"], before[f"{EMBEDDINGS}.{part}"])
    whole = json.loads((tmp_path / "out/config.json").read_text())
    assert whole["quantized_token_embeddings"] == {"bits": 8, "group_size": 32}


@pytest.mark.parametrize("kind", ["auto_round", "auto_gptq", "llm_compressor"])
def test_what_is_not_quantized_stays_as_it_is(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    parts = ("qweight", "qzeros", "scales", "g_idx", "_packed", "_scale", "_shape")
    before = load_file(checkpoint / "model.safetensors")
    before["embedding_proj_layer.before_weight.bias"] = before.pop("embedding_proj_layer.bias")
    after, _ = export(checkpoint, tmp_path, kind)
    assert after.pop("embedding_proj_layer.guard_weight").shape == (1,)
    assert others(before, parts) == others(after, parts)
    assert all(torch.equal(before[name], after[name]) for name in others(before, parts))
    # a loader that takes tensors by name or by place meets bias, guard and weight in this order
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for names in (sorted(file.keys()), file.offset_keys()):
            projection = [name.split(".")[1] for name in names if name.startswith("embedding_proj")]
            assert projection == ["before_weight", "guard_weight", "weight"]
