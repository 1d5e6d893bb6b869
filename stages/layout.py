"""What tensors a ColQwen3 checkpoint holds, computed from its config without torch.

Names are the published ones: ``vlm.model.language_model.*``, ``vlm.model.visual.*`` and
``embedding_proj_layer.*``. Shapes follow transformers' Qwen3-VL modules.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "colqwen3"
ARCHITECTURE = "ColQwen3"
BLOCKS = "vlm.model.language_model.layers"
"""The module list whose linears are quantized."""
LEGACY_KEY_MAPPING = {
    r"^model\.language_model\.": "vlm.model.language_model.",
    r"^model\.visual\.": "vlm.model.visual.",
    r"^language_model\.": "vlm.model.language_model.",
    r"^visual\.": "vlm.model.visual.",
    r"^custom_text_proj\.": "embedding_proj_layer.",
}
"""Older key names (regular expression -> replacement) that loaders also accept."""
UNUSED_KEYS = r"^(vlm\.)?lm_head\."
"""The language-model head, stored by some checkpoints and never used in forward."""

Shape = tuple[int, ...]


def published_name(name: str) -> str:
    """Return the published name of a tensor stored under that or a legacy name."""
    for pattern, replacement in LEGACY_KEY_MAPPING.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def is_unused(name: str) -> bool:
    """Whether a stored tensor is one that loading ignores."""
    return re.match(UNUSED_KEYS, name) is not None


def component(name: str) -> str:
    """Return the part of the model that a tensor of this published name belongs to."""
    if name.startswith("vlm.model.visual."):
        return "vision"
    if name.startswith("vlm.model.language_model.embed_tokens."):
        return "token_embeddings"
    if name.startswith("vlm.model.language_model."):
        return "language_model"
    return "projection"


def linears(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the linears to quantize, module name -> (out_features, in_features), in order."""
    text = config["text_config"]
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    head_dim = text.get("head_dim") or hidden // text["num_attention_heads"]
    queries = text["num_attention_heads"] * head_dim
    keys = (text.get("num_key_value_heads") or text["num_attention_heads"]) * head_dim
    block = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"{BLOCKS}.{i}.{name}": shape
        for i in range(text["num_hidden_layers"])
        for name, shape in block.items()
    }


def tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return every tensor of the checkpoint, published name -> shape.

    Raises
    ------
    KeyError, TypeError
        If the config lacks a size, or holds something else in its place.
    """
    hidden = config["text_config"]["hidden_size"]
    shapes: dict[str, Shape] = {}
    shapes.update(_vision(config["vision_config"]))
    shapes.update(_language_model(config))
    shapes["embedding_proj_layer.weight"] = (config["embed_dim"], hidden)
    shapes["embedding_proj_layer.bias"] = (config["embed_dim"],)
    return shapes


def _language_model(config: Mapping[str, Any]) -> dict[str, Shape]:
    text = config["text_config"]
    hidden = text["hidden_size"]
    head_dim = text.get("head_dim") or hidden // text["num_attention_heads"]
    prefix = "vlm.model.language_model"
    shapes: dict[str, Shape] = {f"{prefix}.embed_tokens.weight": (text["vocab_size"], hidden)}
    for name, shape in linears(config).items():
        shapes[f"{name}.weight"] = shape
        if text.get("attention_bias") and ".self_attn." in name:
            shapes[f"{name}.bias"] = shape[:1]
    for i in range(text["num_hidden_layers"]):
        shapes[f"{BLOCKS}.{i}.input_layernorm.weight"] = (hidden,)
        shapes[f"{BLOCKS}.{i}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{BLOCKS}.{i}.self_attn.q_norm.weight"] = (head_dim,)
        shapes[f"{BLOCKS}.{i}.self_attn.k_norm.weight"] = (head_dim,)
    shapes[f"{prefix}.norm.weight"] = (hidden,)
    return shapes


def _vision(vision: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    prefix = "vlm.model.visual"
    shapes: dict[str, Shape] = {
        f"{prefix}.pos_embed.weight": (vision["num_position_embeddings"], hidden)
    }

    def add(name: str, *weight: int) -> None:
        """Add a module with a weight and a bias of the weight's first size."""
        shapes[f"{prefix}.{name}.weight"] = weight
        shapes[f"{prefix}.{name}.bias"] = weight[:1]

    add(
        "patch_embed.proj",
        hidden,
        vision["in_channels"],
        vision["temporal_patch_size"],
        patch,
        patch,
    )
    for i in range(vision["depth"]):
        add(f"blocks.{i}.norm1", hidden)
        add(f"blocks.{i}.norm2", hidden)
        add(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
        add(f"blocks.{i}.attn.proj", hidden, hidden)
        add(f"blocks.{i}.mlp.linear_fc1", inner, hidden)
        add(f"blocks.{i}.mlp.linear_fc2", hidden, inner)
    mergers = {"merger": hidden}
    for i in range(len(vision["deepstack_visual_indexes"])):
        mergers[f"deepstack_merger_list.{i}"] = merged
    for name, norm in mergers.items():
        add(f"{name}.norm", norm)
        add(f"{name}.linear_fc1", merged, merged)
        add(f"{name}.linear_fc2", vision["out_hidden_size"], merged)
    return shapes


def quantized_bytes(shape: Shape, bits: int, group_size: int) -> int:
    """Return the bytes of one linear in the ``auto_round`` format.

    Weights and zero points are packed into int32 words; a group has one float16 scale.
    """
    out_features, in_features = shape
    groups = in_features // group_size
    words = math.ceil(in_features * bits / 32) * out_features + groups * math.ceil(
        out_features * bits / 32
    )
    return 4 * words + 2 * groups * out_features
