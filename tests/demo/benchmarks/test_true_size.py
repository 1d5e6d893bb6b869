"""Checkpoints of random weights, read back by safetensors, by `inspect` and by the model itself."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from colqwen3.inspection import inspect_folder
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import UserError
from demo.benchmarks import true_size
from demo.benchmarks.true_size import (
    PIECE,
    Config,
    make_checkpoint,
    pieces,
    plan_shards,
    preset_config,
    shapes,
    with_demo_tokens,
)

LIMIT = 300_000


def tiny() -> Config:
    """Return a config of two layers whose sizes all differ, and whose token ids are foreign."""
    config: Config = json.loads(Path("demo/model/config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 1, "eos_token_id": 151645,
        "rope_scaling": {
            "mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default",
        },
    }  # fmt: skip
    config["vision_config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "depth": 3, "out_hidden_size": 64,
        "num_heads": 2, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return {**config, "embed_dim": 24, "image_token_id": 151655, "auto_map": {"AutoModel": "m.M"}}


@pytest.fixture(scope="module")
def config() -> Config:
    return with_demo_tokens(tiny(), Path("tiny.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    path = tmp_path_factory.mktemp("true_size") / "made"
    make_checkpoint(config, path, LIMIT, seed=0)
    return path


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        read = load_file(path)
        assert not read.keys() & tensors.keys()
        tensors |= read
    return tensors


def test_inspect_finds_a_whole_model(folder: Path) -> None:
    manifest, metrics = inspect_folder(folder)
    assert metrics["total"]["parameters"] == sum(t.numel() for t in load_all(folder).values())
    assert len(manifest["linears"]) == 14
    assert manifest["unused_tensors"] == []


def test_shards_keep_the_limit_and_the_index_names_them(folder: Path, config: Config) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        tensors = load_file(shard)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= LIMIT or len(tensors) == 1
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        assert all(t.dtype == torch.bfloat16 for t in tensors.values())
        assert (int.from_bytes(shard.read_bytes()[:8], "little") + 8) % 8 == 0
        total += size
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == shapes(config).keys()


def test_it_loads_and_embeds(folder: Path) -> None:
    model = load_model(folder, torch.bfloat16, torch.device("cpu"))
    for name, tensor in load_all(folder).items():
        assert torch.equal(model.get_parameter(name), tensor)
    processor = load_processor(folder, 1280)
    states: list[torch.Tensor] = []
    for layer in model.vlm.model.language_model.layers:
        layer.register_forward_hook(lambda _, __, out: states.append(out))
    with torch.inference_mode():
        texts = model(**processor.process_texts(["total of the year"])).embeddings
        pages = model(
            **processor.process_images([Image.new("RGB", (320, 224), "white")])
        ).embeddings
    assert texts.shape[-1] == pages.shape[-1] == 24
    assert pages.shape[1] == 7 * 10 + 11  # the demo's image token is known to the config
    for result in (texts, pages):
        torch.testing.assert_close(
            result.float().norm(dim=-1), torch.ones(result.shape[:2]), atol=0.02, rtol=0
        )
    assert all(0.02 < state.float().pow(2).mean().sqrt() < 10 for state in states)


def test_weights_have_unequal_channels_and_a_few_outliers(folder: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in load_all(folder).items()}
    layers = "vlm.model.language_model.layers.1"
    weight = tensors[f"{layers}.mlp.gate_proj.weight"]
    columns = weight.pow(2).mean(0).sqrt() * math.sqrt(64)
    assert columns.argmax() == columns.topk(1).indices
    assert 6 < columns.max() < 10
    assert (columns > 3).sum() == 1
    assert 0.8 < columns.median() < 1.2
    rows = weight[:, columns < 3].pow(2).mean(1).sqrt()
    assert 0.2 < rows.log().std() < 0.45  # 0.3 and the noise of 63 values a row
    norm = tensors[f"{layers}.input_layernorm.weight"]
    assert 0.9 < norm.mean() < 1.1 and 0.05 < norm.std() < 0.2
    plain, residual = (tensors[f"{layers}.self_attn.{n}_proj.weight"] for n in "qo")
    inside = residual.flatten().abs().median() * math.sqrt(128)
    assert 1.6 < plain.flatten().abs().median() * math.sqrt(64) / inside < 2.4  # sqrt(2 x 2 layers)
    embedding = tensors["vlm.model.language_model.embed_tokens.weight"]
    assert 0.02 < embedding.std() < 0.05


def test_equal_seeds_give_equal_bytes_on_any_number_of_threads(
    folder: Path, config: Config, tmp_path: Path
) -> None:
    for threads in (1, 3):
        make_checkpoint(config, tmp_path / str(threads), LIMIT, 0, threads)
        for path in folder.iterdir():
            assert (tmp_path / str(threads) / path.name).read_bytes() == path.read_bytes()
    make_checkpoint(config, tmp_path / "other", LIMIT, seed=1)
    before, after = load_all(folder), load_all(tmp_path / "other")
    assert not any(torch.equal(before[name], after[name]) for name in before)
    flat = [tensor.flatten()[:20].tolist() for tensor in before.values()]
    assert len({tuple(values) for values in flat}) == len(flat)  # no tensor repeats another


@pytest.mark.parametrize("threads", [1, 4])
def test_pieces_of_a_tensor_are_all_different_and_in_place(
    threads: int, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(true_size, "PIECE", 640)
    monkeypatch.setattr(
        true_size,
        "make_rows",
        lambda name, shape, rows, *_: torch.tensor(rows).repeat_interleave(
            math.prod(shape[1:])
        ).view(len(rows), -1).bfloat16(),
    )  # fmt: skip
    make_checkpoint(config, tmp_path / "made", LIMIT, 0, threads)
    for tensor in load_all(tmp_path / "made").values():
        rows = torch.arange(tensor.shape[0]).bfloat16().view(-1, *[1] * (tensor.dim() - 1))
        assert torch.equal(tensor, rows.expand_as(tensor))


def test_short_writes_are_continued(
    folder: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., int] = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda to, data, at: real(to, data[:1001], at))
    make_checkpoint(config, tmp_path / "made", LIMIT, seed=0)
    for path in folder.glob("*.safetensors"):
        assert (tmp_path / "made" / path.name).read_bytes() == path.read_bytes()


def test_4b_is_the_published_shape(published_4b: dict[str, Any]) -> None:
    config = preset_config("4b")
    for key, value in published_4b.items():
        part = config[key]
        assert part == value if isinstance(value, int) else value.items() <= part.items()
    assert sum(math.prod(shape) for shape in shapes(config).values()) == 4_438_635_328
    assert sum(config["text_config"]["rope_scaling"]["mrope_section"]) * 2 == 128


def test_8b_is_qwen3_vl_8b_with_a_projection_and_its_head() -> None:
    result = shapes(preset_config("8b"))
    assert result["vlm.lm_head.weight"] == (151936, 4096)
    qwen3_vl_8b = 8_767_123_696  # parameters of Qwen/Qwen3-VL-8B-Instruct
    assert sum(math.prod(shape) for shape in result.values()) == qwen3_vl_8b + 320 * 4096 + 320


@pytest.mark.parametrize("preset", ["4b", "8b"])
def test_no_more_than_a_piece_is_made_at_a_time(preset: str) -> None:
    tensors = shapes(preset_config(preset))
    reached = dict.fromkeys(tensors, 0)
    for name, rows in pieces(tensors):
        assert rows.start == reached[name]
        assert len(rows) * math.prod(tensors[name][1:]) <= PIECE
        reached[name] = rows.stop
    assert all(reached[name] == shape[0] for name, shape in tensors.items())
    assert len(plan_shards(tensors, 2 * 10**9)) == {"4b": 5, "8b": 10}[preset]


def test_an_untied_head_is_written_and_passed_over(tmp_path: Path, config: Config) -> None:
    untied = {**config, "text_config": {**config["text_config"], "tie_word_embeddings": False}}
    make_checkpoint(untied, tmp_path / "made", LIMIT, seed=0)
    manifest, _ = inspect_folder(tmp_path / "made")
    assert manifest["unused_tensors"] == ["vlm.lm_head.weight"]


def test_what_is_there_is_never_overwritten(tmp_path: Path, config: Config) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        make_checkpoint(config, tmp_path, LIMIT, seed=0)
    with pytest.raises(UserError, match="not empty"):
        make_checkpoint(config, tmp_path / "mine.txt", LIMIT, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil._ntuple_diskusage(1, 1, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    with pytest.raises(UserError, match="bytes for the checkpoint"):
        make_checkpoint(config, tmp_path / "made", LIMIT, seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "key", "value", "problem"),
    [
        ("text_config", "vocab_size", 2047, "vocab_size is 2047"),
        ("vision_config", "patch_size", 14, "patch_size is 14"),
        ("vision_config", "spatial_merge_size", None, "spatial_merge_size is None"),
        ("text_config", "hidden_size", None, "hidden_size is None"),
    ],
)
def test_a_config_that_cannot_serve_is_refused_by_the_command(
    section: str,
    key: str,
    value: Any,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny()
    config[section][key] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    words = ["true_size", "--config", str(path), "--out", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(UserError) as caught:
        true_size.main()
    assert str(caught.value).startswith(f"{path}: ") and problem in str(caught.value)
    assert not (tmp_path / "made").exists()


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "demo.benchmarks.true_size", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_writes_any_config(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny()))
    done = command("--config", path, "--out", tmp_path / "made", "--shard-gb", str(LIMIT / 1e9))
    assert done.returncode == 0, done.stderr
    for result in folder.iterdir():
        assert (tmp_path / "made" / result.name).read_bytes() == result.read_bytes()
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert command("--out", tmp_path / "made").returncode == 2
