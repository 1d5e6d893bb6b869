"""What config.json says of a quantized checkpoint, held against its tensors."""

from collections.abc import Mapping
from typing import Any

from colqwen3.checkpoint.headers import TensorInfo
from colqwen3.checkpoint.layout import (
    BITS,
    EMBEDDINGS,
    EMBEDDINGS_BITS,
    EMBEDDINGS_KEY,
    published_name,
)

PACKING_FORMAT = "auto_round:auto_gptq"  # what quantization here writes
PACKED_TABLE = ("weight_packed", "weight_scale")
"""Tensors of quantized token embeddings."""


def check_packing(quantization: dict[str, Any]) -> None:
    """Reject packings that would be read wrongly, such as zero points not stored minus one.

    Raises
    ------
    ValueError
        Naming the key of ``quantization_config``.
    """
    readable = {"quant_method": "auto-round", "packing_format": PACKING_FORMAT}
    for key, value in readable.items():
        if quantization.get(key) != value:
            raise ValueError(
                f"quantization_config.{key} is {quantization.get(key)!r}, only {value!r} can be read"
            )
    if quantization.get("bits") not in BITS:
        raise ValueError("quantization_config.bits is not 2, 3, 4 or 8")
    own = quantization.get("extra_config", {})
    if not isinstance(own, dict):
        raise ValueError("quantization_config.extra_config is not an object")
    for module, values in own.items():
        if not isinstance(values, dict) or values.get("bits") not in BITS:
            raise ValueError(
                f"quantization_config.extra_config: bits of {module} are not 2, 3, 4 or 8"
            )
        for key in values.keys() - {"bits"}:
            if values[key] != quantization.get(key):
                raise ValueError(
                    f"quantization_config.extra_config: {key} of {module} is {values[key]!r}, only "
                    "that of the whole checkpoint can be read"
                )


def linear_bits(quantization: dict[str, Any], linear: str) -> int:
    """Return the bits of a packed linear by ``quantization_config``."""
    own = quantization.get("extra_config", {}).get(linear, quantization)
    return int(own["bits"])


def check_bits(quantization: dict[str, Any], stored: Mapping[str, TensorInfo]) -> None:
    """Compare the bits that ``quantization_config`` gives each linear with its tensors.

    Raises
    ------
    ValueError
        Naming the first linear that differs.
    """
    own = dict(quantization.get("extra_config", {}))
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind != "qweight":
            continue
        module = published_name(module)
        bits = linear_bits(quantization, module)
        own.pop(module, None)
        scales = stored.get(f"{name.removesuffix('.qweight')}.scales")
        groups = scales.shape[0] if scales is not None else 0
        if tensor.shape[0] * 32 != groups * quantization.get("group_size", 0) * bits:
            raise ValueError(
                f"quantization_config gives {module} {bits} bits, its tensors have others"
            )
    if own:
        raise ValueError(
            f"quantization_config.extra_config names {min(own)}, which is not quantized"
        )


def embeddings_bits(config: dict[str, Any], stored: Mapping[str, TensorInfo]) -> int:
    """Return the bits of the token embeddings, 16 where they are not quantized.

    Raises
    ------
    ValueError
        If config.json and the tensors do not agree.
    """
    said = config.get(EMBEDDINGS_KEY)
    packed, scales = (
        next(
            (
                tensor
                for name, tensor in stored.items()
                if published_name(name) == f"{EMBEDDINGS}.{part}"
            ),
            None,
        )
        for part in PACKED_TABLE
    )
    if said is None and packed is None and scales is None:
        return 16
    if not isinstance(said, dict) or said.keys() != {"bits", "group_size"}:
        raise ValueError(
            f"{EMBEDDINGS_KEY} does not give bits and group_size of the token embeddings"
        )
    bits, width = said["bits"], config["text_config"]["hidden_size"]
    if bits not in EMBEDDINGS_BITS or packed is None or scales is None:
        raise ValueError(f"{EMBEDDINGS_KEY} says {bits!r} bits, which the tensors do not have")
    if packed.shape[1] * 32 != width * bits or scales.shape[1] * said["group_size"] != width:
        raise ValueError(f"{EMBEDDINGS_KEY} says {said}, which the tensors do not have")
    return int(bits)
