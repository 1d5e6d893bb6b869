"""What GGUF files contain, and which models llama.cpp would compute otherwise, from configs alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from colqwen3.gguf.layout import (
    TEXT,
    VISION_FILE,
    expected_gguf_bytes,
    find_unsupported,
    gguf_files,
    largest_angle_error,
)

CONFIG: dict[str, Any] = json.loads(Path("demo/model/config.json").read_text())


def test_names_are_those_that_llama_cpp_asks_for() -> None:
    files = gguf_files(CONFIG, {})
    text = {tensor.name for tensor in files[TEXT]}
    vision = {tensor.name for tensor in files[VISION_FILE]}
    block = (
        "attn_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm ffn_norm ffn_gate ffn_up "
        "ffn_down"
    )
    blocks = {f"blk.{i}.{name}.weight" for i in range(4) for name in block.split()}
    assert text == {"token_embd.weight", "output_norm.weight"} | blocks
    both = [
        f"v.blk.{i}.{name}" for i in range(6) for name in ("ln1", "ln2", "attn_qkv", "attn_out")
    ]
    both += [f"v.blk.{i}.{name}" for i in range(6) for name in ("ffn_up", "ffn_down")]
    # the blocks of deepstack are 1 and 3
    both += [f"v.deepstack.{i}.{name}" for i in (1, 3) for name in ("norm", "fc1", "fc2")]
    both += ["v.post_ln", "mm.0", "mm.2", "colqwen3.proj", "v.patch_embd"]
    parts = {f"{name}.{part}" for name in both for part in ("weight", "bias")}
    assert vision == parts | {"v.patch_embd.weight.1", "v.position_embd.weight"}


def test_bytes_of_the_4b_are_known_beforehand(published_4b: dict[str, Any]) -> None:
    rope = {"mrope_section": [24, 20, 20], "rope_theta": 5_000_000}
    config = copy.deepcopy(published_4b)
    config["text_config"]["rope_parameters"] = rope
    expected = expected_gguf_bytes(config)
    linears = 3_633_315_840  # parameters, counted by `inspect`
    # 4.5 and 8.5 bits a weight instead of 16
    assert expected["f16"] - expected["w4"] == linears * 2 - linears * 18 // 32
    assert expected["f16"] - expected["w8"] == linears * 2 - linears * 34 // 32
    assert expected["w3"] == expected["w4"] == 3_661_876_480
    # the vision tower has linears of 4,096 and 1,024 inputs, the vocabulary has 151,936 rows of 2,560
    others = (24 * (4 + 2 * 4) + 4 * (16 + 10)) * 1024 * 1024 + 151_936 * 2560
    assert expected["w4"] - expected["w4-8"] == others * 2 - others * 34 // 32


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "attention_bias", True),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "rope_scaling", {"rope_type": "yarn", "mrope_section": [12, 10, 10]}),
        ("text_config", "rope_scaling", {"rope_type": "default"}),
        ("text_config", "rope_scaling", {"mrope_section": [20, 2, 10]}),
        ("vision_config", "hidden_act", "silu"),
        ("vision_config", "temporal_patch_size", 1),
        ("vision_config", "num_position_embeddings", 2305),
    ],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_found(
    section: str, key: str, value: Any
) -> None:
    assert find_unsupported(CONFIG) is None
    config = copy.deepcopy(CONFIG)
    config[section][key] = value
    said = find_unsupported(config)
    assert said is not None
    assert said.startswith((f"{section}.{key}", f"{section} lacks"))
    assert expected_gguf_bytes(config) == {}


def test_sections_that_leave_fast_pairs_alone_are_found() -> None:
    # 64 pairs: 61 and 62 lie beyond three times 20; 0.0008 radians after 2,048 positions
    assert largest_angle_error([24, 20, 20], 128, 5e6) == pytest.approx(2048 * 5e6 ** (-61 / 64))
    assert largest_angle_error([6, 5, 5], 32, 5e6) == 0
    # pair 4 belongs to height, which reaches to pair 2 here
    assert largest_angle_error([13, 1, 2], 32, 5e6) == pytest.approx(2048 * 5e6 ** (-4 / 16))
