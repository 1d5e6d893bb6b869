"""The tensors of a ColQwen3 checkpoint, computed from its config without torch.

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
VISION = "vlm.model.visual"
"""The vision tower, of whose linears a recipe may quantize parts."""
VISION_PARTS = ("attention", "mlp", "mergers")
"""What `vision_part` tells apart; the patch embedding is no linear and stays 16-bit."""
EMBEDDINGS = "vlm.model.language_model.embed_tokens"
"""The token embeddings: a table of which a forward reads some rows."""
EMBEDDINGS_KEY = "quantized_token_embeddings"
"""Key of config.json that a checkpoint with quantized token embeddings has: bits and group size."""
LEGACY_KEY_MAPPING = {
    r"^model\.language_model\.": "vlm.model.language_model.",
    r"^model\.visual\.": "vlm.model.visual.",
    r"^language_model\.": "vlm.model.language_model.",
    r"^visual\.": "vlm.model.visual.",
    r"^custom_text_proj\.": "embedding_proj_layer.",
    r"^embedding_proj_layer\.before_weight\.bias$": "embedding_proj_layer.bias",
}
"""Other key names (regular expression -> replacement) that loaders also accept: older ones, and
that of the bias in a released folder."""
UNUSED_KEYS = r"^(vlm\.)?lm_head\.|^embedding_proj_layer\.guard_weight$"
"""What is never used in forward: the language-model head, stored by some checkpoints, and the
guard of a released folder."""
RELEASED_BIAS = "embedding_proj_layer.before_weight.bias"
RELEASED_GUARD = "embedding_proj_layer.guard_weight"
"""Bias and guard of the projection in a released folder; docs/engines.md says why."""
WIDTH_KEYS = ("embed_dim", "vector_dim")
"""Where config.json has the width of a token's vector: in a published and in a released folder."""

Shape = tuple[int, ...]

BITS, GROUP_SIZES = (2, 3, 4, 8), (32, 64, 128)
"""The weight formats that recipes may ask for."""
EMBEDDINGS_BITS, VISION_BITS = (8, 4), (8, 4)
"""The same for token embeddings and for parts of the vision tower, beside 16."""

MAX_SIZE, MAX_LAYERS = 2**31, 1000  # far beyond any model, yet quick to list
PACKED = 32  # AutoRound skips a linear whose sizes are not multiples of this
# what Qwen3VLTextConfig takes where a config has no value
TEXT_DEFAULTS = {"head_dim": 128, "num_key_value_heads": 32}


def _size(config: Mapping[str, Any], key: str, maximum: int = MAX_SIZE) -> int:
    """Return a size from a config section.

    Raises
    ------
    KeyError
        If it is absent.
    ValueError
        If it is not a whole number between 1 and `maximum`.
    """
    value = config[key] if key in config or key not in TEXT_DEFAULTS else TEXT_DEFAULTS[key]
    if type(value) is not int or not 1 <= value <= maximum:
        raise ValueError(f"{key} is {repr(value)[:40]}, not a whole number from 1 to {maximum}")
    return value


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


def vector_width(config: Mapping[str, Any]) -> int:
    """Return the width of a token's vector from a config, published or released.

    Raises
    ------
    KeyError
        If it is absent.
    ValueError
        If it is not a whole number from 1, or given twice with different values.
    """
    widths = {_size(config, key) for key in WIDTH_KEYS if config.get(key) is not None}
    if len(widths) > 1:
        raise ValueError("embed_dim and vector_dim differ; remove one")
    return widths.pop() if widths else _size(config, WIDTH_KEYS[0])


def linears(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the linears to quantize, module name -> (out_features, in_features), in order."""
    text = config["text_config"]
    hidden, inner = _size(text, "hidden_size"), _size(text, "intermediate_size")
    head_dim = _size(text, "head_dim")
    queries = _size(text, "num_attention_heads") * head_dim
    # a null stands for as many as there are query heads
    shared = text.get("num_key_value_heads", 0) is None
    keys = queries if shared else _size(text, "num_key_value_heads") * head_dim
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
        for i in range(_size(text, "num_hidden_layers", MAX_LAYERS))
        for name, shape in block.items()
    }


def vision_linears(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the linears of the vision tower, as `linears` does."""
    shapes: dict[str, Shape] = {}
    for name, shape in _vision(config["vision_config"]).items():
        module = name.removesuffix(".weight")
        if module != name and len(shape) == 2 and not module.endswith(".pos_embed"):
            shapes[module] = (shape[0], shape[1])
    return shapes


def vision_part(linear: str) -> str:
    """Return which of `VISION_PARTS` a linear of the vision tower belongs to."""
    if ".attn." in linear:
        return "attention"
    return "mlp" if ".mlp." in linear else "mergers"


def all_linears(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the linears of language model and vision tower, as `linears` does.

    The projection is not among them: the model reads the dtype of its weight.
    """
    return {**linears(config), **vision_linears(config)}


def embeddings_shape(config: Mapping[str, Any]) -> Shape:
    """Return the shape of the token embeddings, [tokens of the vocabulary, hidden]."""
    return _size(config["text_config"], "vocab_size"), _size(config["text_config"], "hidden_size")


def quantizable(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return all that a recipe may quantize: `all_linears`, then the token embeddings."""
    return {**all_linears(config), EMBEDDINGS: embeddings_shape(config)}


def tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return every tensor of the checkpoint, published name -> shape.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the config lacks a size, or contains something else in its place.
    """
    hidden, width = _size(config["text_config"], "hidden_size"), vector_width(config)
    shapes: dict[str, Shape] = {}
    shapes.update(_vision(config["vision_config"]))
    shapes.update(_language_model(config))
    shapes["embedding_proj_layer.weight"] = (width, hidden)
    shapes["embedding_proj_layer.bias"] = (width,)
    return shapes


def _language_model(config: Mapping[str, Any]) -> dict[str, Shape]:
    text = config["text_config"]
    hidden, head_dim = _size(text, "hidden_size"), _size(text, "head_dim")
    prefix = "vlm.model.language_model"
    shapes: dict[str, Shape] = {
        f"{prefix}.embed_tokens.weight": (_size(text, "vocab_size"), hidden)
    }
    for name, shape in linears(config).items():
        shapes[f"{name}.weight"] = shape
        if text.get("attention_bias") and ".self_attn." in name:
            shapes[f"{name}.bias"] = shape[:1]
    for i in range(_size(text, "num_hidden_layers", MAX_LAYERS)):
        shapes[f"{BLOCKS}.{i}.input_layernorm.weight"] = (hidden,)
        shapes[f"{BLOCKS}.{i}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{BLOCKS}.{i}.self_attn.q_norm.weight"] = (head_dim,)
        shapes[f"{BLOCKS}.{i}.self_attn.k_norm.weight"] = (head_dim,)
    shapes[f"{prefix}.norm.weight"] = (hidden,)
    return shapes


def _vision(vision: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, inner = _size(vision, "hidden_size"), _size(vision, "intermediate_size")
    patch, out = _size(vision, "patch_size"), _size(vision, "out_hidden_size")
    merged = hidden * _size(vision, "spatial_merge_size") ** 2
    depth, deepstack = _size(vision, "depth", MAX_LAYERS), vision["deepstack_visual_indexes"]
    if not all(type(index) is int and 0 <= index < depth for index in deepstack):
        raise ValueError(f"deepstack_visual_indexes names layers beyond the {depth} of depth")
    prefix = VISION
    shapes: dict[str, Shape] = {
        f"{prefix}.pos_embed.weight": (_size(vision, "num_position_embeddings"), hidden)
    }

    def add(name: str, *weight: int) -> None:
        """Add a module with a weight and a bias of the weight's first size."""
        shapes[f"{prefix}.{name}.weight"] = weight
        shapes[f"{prefix}.{name}.bias"] = weight[:1]

    add(
        "patch_embed.proj",
        hidden,
        _size(vision, "in_channels"),
        _size(vision, "temporal_patch_size"),
        patch,
        patch,
    )
    for i in range(depth):
        add(f"blocks.{i}.norm1", hidden)
        add(f"blocks.{i}.norm2", hidden)
        add(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
        add(f"blocks.{i}.attn.proj", hidden, hidden)
        add(f"blocks.{i}.mlp.linear_fc1", inner, hidden)
        add(f"blocks.{i}.mlp.linear_fc2", hidden, inner)
    mergers = {"merger": hidden}
    for i in range(len(deepstack)):
        mergers[f"deepstack_merger_list.{i}"] = merged
    for name, norm in mergers.items():
        add(f"{name}.norm", norm)
        add(f"{name}.linear_fc1", merged, merged)
        add(f"{name}.linear_fc2", out, merged)
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


def quantized_table_bytes(shape: Shape, bits: int, group_size: int) -> int:
    """Return the bytes of token embeddings in 8 or 4 bits: packed rows, a float16 scale a group."""
    rows, width = shape
    return rows * (width * bits // 8 + 2 * (width // group_size))
