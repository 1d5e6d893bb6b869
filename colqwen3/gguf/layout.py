"""The tensors of the GGUF files, computed from a model's config alone; no package ``gguf`` needed.

llama.cpp reads a vision-language model from two files: its language model (architecture
``qwen3vl``) and its vision tower (architecture ``clip``, projector ``qwen3vl_merger``). The former
takes no tensor that it does not know, so ColQwen3's projection lies in the latter. Names are those
of llama.cpp's ``convert_hf_to_gguf.py``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colqwen3.checkpoint.layout import (
    BLOCKS,
    VISION,
    Shape,
    linears,
    quantizable,
    tensors,
)

TEXT, VISION_FILE = "text.gguf", "mmproj.gguf"
PROJECTION = "colqwen3.proj"
BLOCK = 32
"""Weights of a row that share one scale in Q4_0 and Q8_0."""
BLOCK_BYTES = {"Q4_0": 2 + BLOCK // 2, "Q8_0": 2 + BLOCK}
FLOAT_BYTES = {"F32": 4, "F16": 2}
ALIGNMENT = 32
"""Every tensor of a file starts at a multiple of this."""
BLOCK_TYPES = {3: "Q4_0", 4: "Q4_0", 8: "Q8_0"}
"""Bits of a recipe -> type whose codes hold them without loss."""
TWO_BITS = (
    "llama.cpp's only type for 2-bit codes with one scale a group, Q2_0, runs ten times slower than "
    "Q4_0, and the package gguf cannot write it"
)
POSITIONS, MAXIMUM_ANGLE = 2048, 0.01
"""More than a query or page has positions, and the radians a rotation may be off at the last."""
FRAMES = 2
"""Frames of a video that one patch spans; llama.cpp stores one tensor for each."""

TEXT_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VISION_NAMES = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
MERGER_NAMES = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
DEEPSTACK_NAMES = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file, and the checkpoint's tensor that it is made of."""

    name: str
    source: str
    """Published name in the checkpoint, ``.weight`` for a packed linear too."""
    kind: str
    """``F32``, ``F16``, ``Q4_0`` or ``Q8_0``."""
    shape: Shape
    frame: int | None = None
    """Index into the third dimension of the patch embedding, where only one frame is taken."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without what aligns the next one."""
        count = math.prod(self.shape)
        if self.kind in BLOCK_BYTES:
            return count // BLOCK * BLOCK_BYTES[self.kind]
        return count * FLOAT_BYTES[self.kind]


def gguf_files(
    config: Mapping[str, Any], packed: Mapping[str, int], dense: str = "F16"
) -> dict[str, list[GgufTensor]]:
    """Return the tensors of each GGUF file, in order.

    Parameters
    ----------
    config
        The model's config.json.
    packed
        Module name of each quantized linear, and of quantized token embeddings -> bits: 3, 4 or 8.
    dense
        Type of the matrices that are not packed, ``F16`` or ``F32``. Vectors, position embeddings
        and the projection are always ``F32``.

    Returns
    -------
    dict
        File name -> tensors.
    """
    files: dict[str, list[GgufTensor]] = {TEXT: [], VISION_FILE: []}
    for source, shape in tensors(config).items():
        module, _, part = source.rpartition(".")
        file, name = _place(module, config)
        if name == "v.patch_embd" and part == "weight":
            flat = (*shape[:2], *shape[3:])  # all but the frames
            for frame, suffix in enumerate(("weight", "weight.1")):
                files[file].append(GgufTensor(f"{name}.{suffix}", source, dense, flat, frame))
            continue
        kind = BLOCK_TYPES[packed[module]] if module in packed else dense
        if len(shape) == 1 or name in ("v.position_embd", PROJECTION):
            kind = "F32"
        files[file].append(GgufTensor(f"{name}.{part}", source, kind, shape))
    return files


def _place(module: str, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the file and the GGUF name of a module of the checkpoint."""
    language_model = BLOCKS.removesuffix(".layers")
    single = {
        f"{language_model}.embed_tokens": (TEXT, "token_embd"),
        f"{language_model}.norm": (TEXT, "output_norm"),
        f"{VISION}.patch_embed.proj": (VISION_FILE, "v.patch_embd"),
        f"{VISION}.pos_embed": (VISION_FILE, "v.position_embd"),
        "embedding_proj_layer": (VISION_FILE, PROJECTION),
    }
    if module in single:
        return single[module]
    if module.startswith(f"{BLOCKS}."):
        number, rest = module.removeprefix(f"{BLOCKS}.").split(".", 1)
        return TEXT, f"blk.{number}.{TEXT_NAMES[rest]}"
    kind, rest = module.removeprefix(f"{VISION}.").split(".", 1)
    if kind == "merger":
        return VISION_FILE, MERGER_NAMES[rest]
    number, rest = rest.split(".", 1)
    if kind == "blocks":
        return VISION_FILE, f"v.blk.{number}.{VISION_NAMES[rest]}"
    block = config["vision_config"]["deepstack_visual_indexes"][int(number)]
    return VISION_FILE, f"v.deepstack.{block}.{DEEPSTACK_NAMES[rest]}"


def aligned(nbytes: int) -> int:
    """Return bytes rounded up to the alignment of a GGUF file."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def tensor_bytes(files: Mapping[str, list[GgufTensor]]) -> int:
    """Return the bytes of all tensors of some files, with what aligns them, without the headers."""
    return sum(aligned(tensor.nbytes) for part in files.values() for tensor in part)


def expected_gguf_bytes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of the tensors of both files for every width that fits, and for ``f16``.

    Keys are ``f16``, ``w<bits>``, and ``w<bits>-8`` with token embeddings and the vision tower in 8
    bits; a group's scale is repeated in each block, so that the group size changes nothing. Empty
    for a model that llama.cpp cannot run.
    """
    if find_unsupported(config):
        return {}
    choices: dict[str, dict[str, int]] = {"f16": {}}
    shapes = quantizable(config)
    for bits in BLOCK_TYPES:
        text = dict.fromkeys(linears(config), bits)
        choices[f"w{bits}"] = text
        choices[f"w{bits}-8"] = {**dict.fromkeys(shapes, 8), **text}
    return {
        key: tensor_bytes(gguf_files(config, packed))
        for key, packed in choices.items()
        if all(shapes[name][1] % BLOCK == 0 for name in packed)
    }


def find_unsupported(config: Mapping[str, Any]) -> str | None:
    """Return what of a config stock llama.cpp would compute otherwise, None if nothing.

    llama.cpp reads none of these from the files: they are fixed in its code for Qwen3-VL.
    """
    text, vision = config["text_config"], config["vision_config"]
    rope = rope_parameters(config)
    side = math.isqrt(vision["num_position_embeddings"])
    checks: list[tuple[str, object, object]] = [
        ("text_config.attention_bias", bool(text.get("attention_bias")), False),
        ("text_config.hidden_act", text.get("hidden_act", "silu"), "silu"),
        ("text_config.rope_scaling.rope_type", rope.get("rope_type", "default"), "default"),
        (
            "vision_config.hidden_act",
            vision.get("hidden_act", "gelu_pytorch_tanh"),
            "gelu_pytorch_tanh",
        ),
        ("vision_config.temporal_patch_size", vision["temporal_patch_size"], FRAMES),
        ("vision_config.in_channels", vision["in_channels"], 3),
        ("vision_config.num_position_embeddings", vision["num_position_embeddings"], side * side),
    ]
    for key, value, expected in checks:
        if value != expected:
            return f"{key} is {value!r}, llama.cpp computes with {expected!r}"
    sections = rope.get("mrope_section")
    if not isinstance(sections, list) or len(sections) != 3:
        return "text_config.rope_scaling lacks mrope_section"
    angle = largest_angle_error(sections, text.get("head_dim", 128), rope.get("rope_theta", 5e5))
    if angle > MAXIMUM_ANGLE:
        return f"text_config.rope_scaling.mrope_section is {sections}, which llama.cpp rotates otherwise"
    return None


def largest_angle_error(sections: Sequence[int], head_dim: int, theta: float) -> float:
    """Return by how much llama.cpp rotates a token of a text wrongly, at most, in radians.

    Pair i of a head belongs to time, height or width by ``i % 3``, as far as three times that
    section reaches. What is beyond, transformers rotates by the position in time, llama.cpp not at
    all. With the published sections [24, 20, 20] these are the two slowest but one, whose angle is
    nothing. Source: ``ggml_mrope_cache_init`` of llama.cpp, ``apply_interleaved_mrope`` of
    transformers.

    Parameters
    ----------
    sections
        Pairs of a head that belong to time, height and width.
    head_dim
        Numbers of a head, twice its pairs.
    theta
        Base of the rotary embeddings.
    """
    still = [pair for pair in range(head_dim // 2) if pair >= 3 * sections[pair % 3]]
    return max((POSITIONS * theta ** (-2 * pair / head_dim) for pair in still), default=0.0)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of rotary embeddings: ``rope_theta``, ``rope_type``, ``mrope_section``.

    transformers 4 keeps them in ``rope_scaling`` and ``rope_theta``, transformers 5 in
    ``rope_parameters``.
    """
    text = config["text_config"]
    values: dict[str, Any] = {
        **(text.get("rope_scaling") or {}),
        **(text.get("rope_parameters") or {}),
    }
    if "rope_theta" in text:
        values.setdefault("rope_theta", text["rope_theta"])
    return values
