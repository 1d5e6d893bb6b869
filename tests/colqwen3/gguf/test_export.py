"""The files hold what the checkpoint holds, read by llama.cpp's own Python package."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from colqwen3.gguf.export import DENSE, export_gguf
from colqwen3.gguf.layout import (
    TEXT,
    VISION_FILE,
    GgufTensor,
    expected_gguf_bytes,
    gguf_files,
)
from colqwen3.model.loading import dense_tensors
from stages.quantization.allocation import uniform
from stages.quantization.recipes import RtnRecipe
from tests.colqwen3.gguf.conftest import DEMO, RECIPES, enlarged
from tests.helpers.refusal import refusal

gguf = pytest.importorskip("gguf")
Exporter = Callable[..., Path]
Maker = Callable[[str], Path]


def read(folder: Path) -> dict[str, Any]:
    """All tensors of both files by name."""
    readers = [gguf.GGUFReader(folder / name) for name in (TEXT, VISION_FILE)]
    return {tensor.name: tensor for reader in readers for tensor in reader.tensors}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model folder by published name, packed ones dequantized to float32."""
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" not in config:
        parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        return {name: tensor for part in parts for name, tensor in part.items()}
    return dict(dense_tensors(folder, config, torch.float32))


def packed_bits(name: str) -> dict[str, int]:
    """Bits of every quantized module of a model of `RECIPES`."""
    if name not in RECIPES:
        return {}
    recipe = RtnRecipe(method="rtn", calibration="none", sym=True, **RECIPES[name])
    return uniform(name, recipe, json.loads((DEMO / "config.json").read_text())).modules


def planned(folder: Path, name: str, dtype: str = "float16") -> list[GgufTensor]:
    config = json.loads((folder / "config.json").read_text())
    files = gguf_files(config, packed_bits(name), DENSE[dtype])
    return [tensor for part in files.values() for tensor in part]


def bits_of(values: Any) -> torch.Tensor:
    return torch.tensor(values).float().contiguous().view(torch.int32)


@pytest.mark.parametrize("name", RECIPES)
def test_every_block_is_the_checkpoints_own_weight_bit_for_bit(
    models: Maker, exported: Exporter, name: str
) -> None:
    folder = models(name)
    expected, tensors = weights(folder), read(exported(name))
    blocks = [t for t in planned(folder, name) if t.kind.startswith("Q")]
    others = {"w4g32-8": 6 * 4 + 3 * 2 + 1, "w8g64-4": 6 * 2 + 1}
    assert len(blocks) == 28 + others.get(name, 0)
    negative = 0
    for tensor in blocks:
        stored = tensors[tensor.name]
        bits = packed_bits(name)[tensor.source.removesuffix(".weight")]
        kind = "Q8_0" if bits == 8 else "Q4_0"
        assert stored.tensor_type == gguf.GGMLQuantizationType[kind]
        # the package's reader, which is no part of this project
        values = gguf.dequantize(stored.data, stored.tensor_type)
        assert torch.equal(bits_of(values), expected[tensor.source].view(torch.int32)), tensor.name
        negative += int((torch.from_numpy(stored.data.copy())[:, 1] & 0x80 > 0).sum())
    assert negative > 0  # scales whose sign bit is set


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("demo", "float16"),
        ("demo", "float32"),
        ("other", "float16"),
        ("w4g32", "float16"),
        ("w8g64-4", "float16"),
    ],
)
def test_everything_else_is_the_weight_in_the_asked_precision(
    models: Maker, exported: Exporter, name: str, dtype: str
) -> None:
    folder = models(name)
    expected, tensors = weights(folder), read(exported(name, dtype))
    dense = [t for t in planned(folder, name, dtype) if not t.kind.startswith("Q")]
    assert len(tensors) == len(planned(folder, name, dtype))
    for tensor in dense:
        value = expected[tensor.source]
        if tensor.frame is not None:
            value = value[:, :, tensor.frame]
        one = len(value.shape) == 1 or "position_embd" in tensor.name or "proj" in tensor.name
        precision = torch.float32 if one or dtype == "float32" else torch.float16
        actual = torch.tensor(tensors[tensor.name].data)
        assert actual.dtype == precision, tensor.name
        assert torch.equal(actual.reshape(value.shape), value.to(precision)), tensor.name


@pytest.mark.parametrize("name", ["demo", "other", *sorted(RECIPES.keys() - {"w8g64-4"})])
def test_inspect_foretells_the_bytes(models: Maker, exported: Exporter, name: str) -> None:
    config = json.loads((models(name) / "config.json").read_text())
    others = "-8" if name.endswith("-8") else ""
    key = f"w{RECIPES[name]['bits']}{others}" if name in RECIPES else "f16"
    sizes = 0
    for file in (TEXT, VISION_FILE):
        path = exported(name) / file
        sizes += path.stat().st_size - gguf.GGUFReader(path).data_offset
    assert sizes == expected_gguf_bytes(config)[key]


def test_hyperparameters_are_those_of_the_config(exported: Exporter) -> None:
    config = json.loads((DEMO / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    first, second = (gguf.GGUFReader(exported("demo") / name) for name in (TEXT, VISION_FILE))

    def value(reader: Any, key: str) -> Any:
        return reader.get_field(key).contents()

    assert value(first, "general.architecture") == "qwen3vl"
    for key, name in {
        "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
        "attention.value_length": "head_dim", "context_length": "max_position_embeddings",
        "rope.freq_base": "rope_theta",
    }.items():  # fmt: skip
        assert value(first, f"qwen3vl.{key}") == text[name], key
    assert value(first, "qwen3vl.rope.dimension_sections") == [12, 10, 10, 0]
    assert value(first, "qwen3vl.n_deepstack_layers") == 2
    assert value(first, "qwen3vl.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    for key, name in {
        "block_count": "depth", "embedding_length": "hidden_size", "patch_size": "patch_size",
        "feed_forward_length": "intermediate_size", "attention.head_count": "num_heads",
        "projection_dim": "out_hidden_size", "spatial_merge_size": "spatial_merge_size",
    }.items():  # fmt: skip
        assert value(second, f"clip.vision.{key}") == vision[name], key
    assert value(second, "clip.vision.is_deepstack_layers") == [i in (1, 3) for i in range(6)]
    assert value(second, "clip.vision.image_size") == 48 * 16  # 2,304 position embeddings
    assert value(second, "colqwen3.max_pixels") == 1280 * 32 * 32


def test_three_bits_are_written_with_a_warning(
    models: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="colqwen3"):
        export_gguf(models("w3g64"), tmp_path)
        assert "no smaller than those of 4 bits" in caplog.text
        caplog.clear()
        export_gguf(models("w4g32"), tmp_path)
        assert not caplog.text


def test_a_large_tensor_is_never_whole_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of the token embeddings, which are the largest tensor of the 4B, are small."""
    from colqwen3.gguf import export

    rows = 200_000
    folder = enlarged(tmp_path / "model", rows)
    largest, convert = [0], export._convert

    def measured(*arguments: Any) -> Any:
        for part in convert(*arguments):
            largest[0] = max(largest[0], part.nbytes)
            yield part

    monkeypatch.setattr(export, "_convert", measured)
    (tmp_path / "out").mkdir()
    export_gguf(folder, tmp_path / "out")
    assert (tmp_path / "out" / TEXT).stat().st_size > rows * 512
    assert largest[0] <= 16 << 20


# ---- What is refused ----------------------------------------------------------------------------


def copied(tmp_path: Path, source: Path = DEMO) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from safetensors.torch import save_file

    (path,) = [p for p in folder.glob("*.safetensors") if name in load_file(p)]
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def test_two_bits_are_refused_with_the_reason(models: Maker, tmp_path: Path) -> None:
    folder = copied(tmp_path, models("w4g32"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bits"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    said = refusal(export_gguf, folder, tmp_path)
    assert "has 2-bit weights; llama.cpp's only type for 2-bit codes" in said


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder, name = copied(tmp_path), "vlm.model.visual.blocks.0.mlp.linear_fc1.weight"

    def enlarge(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = 1e5
        return tensor

    change_tensor(folder, name, enlarge)
    said = refusal(export_gguf, folder, tmp_path)
    assert f"{name} holds weights beyond float16; export with --dtype float32" in said
    export_gguf(folder, tmp_path, "float32")
    change_tensor(folder, name, lambda tensor: tensor.fill_(torch.nan))
    assert "holds NaN or infinite weights" in refusal(export_gguf, folder, tmp_path, "float32")


def test_asymmetric_codes_are_refused(models: Maker, tmp_path: Path) -> None:
    folder = copied(tmp_path, models("w4g32"))
    name = "vlm.model.language_model.layers.2.mlp.up_proj"
    change_tensor(folder, f"{name}.qzeros", lambda zeros: zeros + 1)
    said = refusal(export_gguf, folder, tmp_path)
    assert f"{name} has zero points that are not in the middle" in said


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"model_type": "qwen3_vl"}, "only 'colqwen3' is supported"),
        ("config.json", {"text_config": {}}, "lacks a size"),
        ("config.json", {"embed_dim": 64}, "config.json gives [64, 256]"),
        ("preprocessor_config.json", {"resample": 2}, "resample is 2, the GGUF runner uses 3"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is False"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    tmp_path: Path, file: str, changes: dict[str, Any], reason: str
) -> None:
    folder = copied(tmp_path)
    edit(folder / file, **changes)
    assert reason in refusal(export_gguf, folder, tmp_path)


def test_a_missing_or_truncated_weight_is_refused(models: Maker, tmp_path: Path) -> None:
    folder = copied(tmp_path, models("w4g32"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "the file again" in refusal(export_gguf, folder, tmp_path)
    (folder / "tokenizer.json").unlink()
    shutil.copy(models("w4g32") / "model.safetensors", path)
    assert "tokenizer" in refusal(export_gguf, folder, tmp_path)


def test_without_the_package_the_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf==0.19.0" in refusal(export_gguf, DEMO, tmp_path)
