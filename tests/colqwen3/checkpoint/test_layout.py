"""Names and shapes against transformers' own modules, packed sizes against auto-round's."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

from colqwen3.checkpoint import layout
from colqwen3.model import ColQwen3, ColQwen3Config
from colqwen3.model import modeling_colqwen3 as modeling

Config = dict[str, Any]
GOLDEN: Config = json.loads(Path("tests/golden/model/config.json").read_text())
DEMO: Config = json.loads(Path("demo/model/config.json").read_text())


def changed(text: Config | None = None, vision: Config | None = None, **outer: Any) -> Config:
    config = copy.deepcopy(GOLDEN)
    config["text_config"].update(text or {})
    config["vision_config"].update(vision or {})
    return {**config, **outer}


CONFIGS = {
    "golden": GOLDEN,
    "demo": DEMO,
    "odd sizes": changed(
        {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 77, "num_hidden_layers": 1},
        {"out_hidden_size": 96},
        embed_dim=7,
    ),
    "other heads": changed({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}),
    "key heads null": changed({"num_key_value_heads": None}),
    "attention bias": changed({"attention_bias": True}),
    "other vision": changed(
        vision={
            "depth": 2, "hidden_size": 48, "intermediate_size": 52, "in_channels": 1,
            "patch_size": 14, "spatial_merge_size": 3, "temporal_patch_size": 1,
            "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1],
        }
    ),
    "no deepstack": changed(vision={"deepstack_visual_indexes": []}),
    "deepstack of one": changed(vision={"deepstack_visual_indexes": [2]}),
}  # fmt: skip


def build(config: Config) -> torch.nn.Module:
    """Return the real model without memory for its weights."""
    with torch.device("meta"):
        model: torch.nn.Module = ColQwen3(ColQwen3Config(**copy.deepcopy(config)))
    return model


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_those_of_the_model(name: str) -> None:
    config = CONFIGS[name]
    before = copy.deepcopy(config)
    assert layout.tensors(config) == shapes_of(config)
    assert config == before


@pytest.mark.parametrize("name", CONFIGS)
def test_linears_are_those_of_the_decoder_layers_in_order(name: str) -> None:
    config = CONFIGS[name]
    expected = [
        (path, (module.out_features, module.in_features))
        for path, module in build(config).named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith(f"{layout.BLOCKS}.")
    ]
    assert list(layout.linears(config).items()) == expected


def test_names_are_the_published_ones() -> None:
    with Path("tests/golden/model/model.safetensors.index.json").open() as file:
        published = json.load(file)["weight_map"]  # written by the publisher's own code
    assert layout.tensors(GOLDEN).keys() == published.keys()


def test_published_4b_model_has_the_known_size(published_4b: Config) -> None:
    tensors, linears = layout.tensors(published_4b), layout.linears(published_4b)
    assert tensors == shapes_of(published_4b)
    assert len(tensors) == 715
    assert sum(map(math.prod, tensors.values())) == 4_438_635_328
    assert len(linears) == 252
    assert sum(map(math.prod, linears.values())) == 3_633_315_840
    sizes = {}
    for group_size in (128, 64, 32):
        remaining = [
            math.prod(s) for n, s in tensors.items() if n.removesuffix(".weight") not in linears
        ]
        packed = [layout.quantized_bytes(shape, 4, group_size) for shape in linears.values()]
        sizes[group_size] = 2 * sum(remaining) + sum(packed)
    assert sizes[128] == 3_498_260_096
    # what AutoRound wrote for this shape, file headers included
    assert abs(sizes[128] / 3_498_532_350 - 1) < 0.001
    assert [round(sizes[g] / 1e9, 3) for g in (64, 32)] == [3.569, 3.711]


# ---- Packed sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(32, 128), (64, 256), (96, 384), (320, 1280)])
def test_bytes_are_those_of_the_librarys_layer(
    bits: int, group_size: int, shape: tuple[int, int]
) -> None:
    out_features, in_features = shape
    layer = QuantLinear(bits, group_size, in_features, out_features, bias=False)
    buffers = dict(layer.named_buffers())
    assert buffers.keys() == {"qweight", "qzeros", "scales"}
    expected = sum(buffer.numel() * buffer.element_size() for buffer in buffers.values())
    assert layout.quantized_bytes(shape, bits, group_size) == expected


# ---- Names --------------------------------------------------------------------------------------


def test_the_loader_renames_and_ignores_the_same_keys() -> None:
    assert layout.LEGACY_KEY_MAPPING == modeling.LEGACY_KEY_MAPPING
    assert list(layout.LEGACY_KEY_MAPPING) == list(modeling.LEGACY_KEY_MAPPING)
    assert layout.UNUSED_KEYS == modeling.UNUSED_KEYS
    assert ColQwen3Config.model_type == layout.MODEL_TYPE
    assert ColQwen3.__name__ == layout.ARCHITECTURE


@pytest.mark.parametrize(
    ("stored", "published"),
    [
        ("model.language_model.norm.weight", "vlm.model.language_model.norm.weight"),
        ("language_model.norm.weight", "vlm.model.language_model.norm.weight"),
        ("model.visual.merger.norm.bias", "vlm.model.visual.merger.norm.bias"),
        ("visual.merger.norm.bias", "vlm.model.visual.merger.norm.bias"),
        ("custom_text_proj.weight", "embedding_proj_layer.weight"),
        ("vlm.model.visual.pos_embed.weight", "vlm.model.visual.pos_embed.weight"),
        ("embedding_proj_layer.bias", "embedding_proj_layer.bias"),
        ("other.visual.weight", "other.visual.weight"),
        ("visualx.weight", "visualx.weight"),
        ("models.visual.weight", "models.visual.weight"),
    ],
)
def test_legacy_names(stored: str, published: str) -> None:
    assert layout.published_name(stored) == published


@pytest.mark.parametrize("config", [GOLDEN, DEMO], ids=["golden", "demo"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_every_legacy_name_has_one_published_name(config: Config, prefix: str) -> None:
    for name in layout.tensors(config):
        legacy = name.replace("vlm.model.", prefix).replace(
            "embedding_proj_layer.", "custom_text_proj."
        )
        assert legacy != name
        assert layout.published_name(legacy) == name
        assert layout.published_name(name) == name


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("vlm.lm_head.weight", True),
        ("lm_head.weight", True),
        ("lm_head.bias", True),
        ("vlm.model.lm_head.weight", False),
        ("my_lm_head.weight", False),
        ("lm_headroom.weight", False),
        ("embedding_proj_layer.weight", False),
    ],
)
def test_only_the_head_is_unused(name: str, unused: bool) -> None:
    assert layout.is_unused(name) == unused


def test_components_split_the_model_as_its_modules_do() -> None:
    model: Any = build(GOLDEN)
    parts: Mapping[str, torch.nn.Module] = {
        "vision": model.vlm.model.visual,
        "token_embeddings": model.get_input_embeddings(),
        "projection": model.embedding_proj_layer,
    }
    owner = {id(p): part for part, module in parts.items() for p in module.parameters()}
    for name, parameter in model.named_parameters():
        assert layout.component(name) == owner.get(id(parameter), "language_model"), name


# ---- Incomplete configs -------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["text_config", "vision_config", None])
def test_a_config_without_its_sizes_is_an_error(section: str | None) -> None:
    read = {
        None: ["embed_dim", "text_config", "vision_config"],
        "text_config": [
            "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
            "vocab_size",
        ],
        "vision_config": [
            "deepstack_visual_indexes", "depth", "hidden_size", "in_channels", "intermediate_size",
            "num_position_embeddings", "out_hidden_size", "patch_size", "spatial_merge_size",
            "temporal_patch_size",
        ],
    }  # fmt: skip
    for key in read[section]:
        config = copy.deepcopy(GOLDEN)
        del (config[section] if section else config)[key]
        with pytest.raises(KeyError, match=key):
            layout.tensors(config)


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads"])
def test_absent_head_sizes_are_transformers_defaults(key: str) -> None:
    config = copy.deepcopy(GOLDEN)
    del config["text_config"][key]
    assert layout.tensors(config) == shapes_of(config)
