"""What a model is and what quantizing it will give, from config and headers alone."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from colqwen3.checkpoint import layout
from colqwen3.checkpoint.fingerprint import fingerprint, model_files
from colqwen3.checkpoint.headers import TensorInfo, read_headers, weight_files
from colqwen3.gguf.layout import expected_gguf_bytes
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json

FLOATS = ("BF16", "F16", "F32")


def inspect_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inspect a model folder; return the manifest and the metrics.

    The manifest lists files, components, the linears to quantize and the config. The metrics
    count tensors, parameters and bytes, and give the bytes of the weights that each bits and
    group size would leave (key ``w<bits>g<group size>``; absent where it does not divide), what
    quantizing token embeddings and parts of the vision tower would save of them, and the bytes as
    GGUF files.

    Raises
    ------
    UserError
        If the folder is not a supported, complete, 16- or 32-bit ColQwen3.
    """
    config = read_config(folder)
    stored = read_headers(folder)
    tensors = check_layout(folder, config, stored)
    linears = layout.linears(config)
    components = count_components(tensors)
    total = {
        key: sum(part[key] for part in components.values())
        for key in ("tensors", "parameters", "bytes")
    }
    metrics = {
        "total": total,
        "components": components,
        "files_bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "quantizable": {
            "linears": len(linears),
            "parameters": sum(math.prod(shape) for shape in linears.values()),
        },
        "expected_bytes": expected_bytes(tensors, linears),
        "expected_savings": expected_savings(tensors, config),
        "expected_gguf_bytes": expected_gguf_bytes(config),
    }
    manifest = {
        "model_type": layout.MODEL_TYPE,
        "config": config,
        "files": {path.name: fingerprint(path) for path in model_files(folder)},
        "components": components,
        "linears": {name: list(shape) for name, shape in linears.items()},
        "unused_tensors": sorted(name for name in stored if layout.is_unused(name)),
    }
    return manifest, metrics


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json and reject a model that cannot be quantized.

    Raises
    ------
    UserError
        If the config is missing, damaged, of another model, or already quantized, or the tokenizer
        needs code of its own.
    """
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.exists():
        raise UserError(
            f"{adapter}: the folder is a LoRA adapter, not a whole model; merge it into its base model "
            "(peft: merge_and_unload) and give the merged folder as model.source"
        )
    config = read_json(path, "give a complete model folder")
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a JSON object; fetch it again")
    model_type = config.get("model_type")
    if model_type != layout.MODEL_TYPE:
        raise UserError(
            f"{path}: model_type is {model_type!r}; only {layout.MODEL_TYPE!r} is supported"
        )
    architectures = config.get("architectures") or [layout.ARCHITECTURE]
    if architectures != [layout.ARCHITECTURE]:
        raise UserError(
            f"{path}: architectures is {architectures}; only ['{layout.ARCHITECTURE}'] is supported"
        )
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{path}: the model is already quantized; give its 16-bit original, in params.yaml as "
            "model.source"
        )
    check_tokenizer(folder, config)
    return config


def check_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Reject a tokenizer that needs Python files of the model folder.

    No code travels with a quantized folder, so that another class would tokenize there: token
    counts and embeddings would differ from those of the original without a word.

    Raises
    ------
    UserError
        If ``auto_map`` of tokenizer_config.json or config.json names a tokenizer class.
    """
    path = folder / "tokenizer_config.json"
    tokenizer_config = read_json(path, "fetch it again") if path.exists() else {}
    for file, content in ((path, tokenizer_config), (folder / "config.json", config)):
        auto_map = content.get("auto_map") if isinstance(content, dict) else None
        # a list is the older form of tokenizer_config.json, for the tokenizer alone
        if isinstance(auto_map, list) or (
            isinstance(auto_map, dict) and "AutoTokenizer" in auto_map
        ):
            raise UserError(
                f"{file}: auto_map names code of the model's own for its tokenizer, which a quantized "
                "folder would lack, and then tokenize otherwise; give the model a tokenizer that "
                "needs no code, and remove AutoTokenizer from auto_map"
            )


def check_layout(
    folder: Path, config: dict[str, Any], stored: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Return the used tensors by published name, after comparing them with the config.

    Raises
    ------
    UserError
        If a tensor is missing, unknown, stored twice, of another shape or not a float.
    """
    try:
        expected = layout.tensors(config)
        for linear, shape in layout.linears(config).items():
            if any(size % layout.PACKED for size in shape):
                raise ValueError(f"{linear} is {list(shape)}, not a multiple of {layout.PACKED}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        missing = isinstance(error, KeyError)
        reason = f"lacks {error}" if missing else f"has a wrong size ({error})"
        raise UserError(
            f"{folder / 'config.json'}: {reason}; give the model's own config"
        ) from None
    tensors: dict[str, TensorInfo] = {}
    for stored_name, tensor in stored.items():
        if layout.is_unused(stored_name):
            continue
        name, where = layout.published_name(stored_name), f"{folder / tensor.file}: {stored_name}"
        if name not in expected:
            raise UserError(
                f"{where} is not a tensor of a ColQwen3 with this config; check config.json"
            )
        if tensor.shape != expected[name]:
            raise UserError(
                f"{where} has shape {list(tensor.shape)}, config.json gives {list(expected[name])}; "
                "correct config.json, or fetch the file again"
            )
        if tensor.dtype not in FLOATS:
            raise UserError(f"{where} is {tensor.dtype}; supported are {', '.join(FLOATS)}")
        tensors[name] = tensor
    for name in expected:
        if name not in tensors:
            raise UserError(f"{folder}: lacks the tensor {name}; fetch the folder again")
    return tensors


def count_components(tensors: dict[str, TensorInfo]) -> dict[str, dict[str, int]]:
    """Return tensors, parameters and bytes of each component."""
    counts: dict[str, Counter[str]] = {}
    for name, tensor in tensors.items():
        part = counts.setdefault(layout.component(name), Counter())
        part["tensors"] += 1
        part["parameters"] += math.prod(tensor.shape)
        part["bytes"] += tensor.nbytes
    return {name: dict(part) for name, part in sorted(counts.items())}


def expected_bytes(
    tensors: dict[str, TensorInfo], linears: dict[str, layout.Shape]
) -> dict[str, int]:
    """Return the bytes of the tensors after quantization for every format that fits the model."""
    rest = sum(
        t.nbytes for name, t in tensors.items() if name.removesuffix(".weight") not in linears
    )
    return {
        f"w{bits}g{group_size}": rest
        + sum(layout.quantized_bytes(shape, bits, group_size) for shape in linears.values())
        for bits in layout.BITS
        for group_size in layout.GROUP_SIZES
        if all(in_features % group_size == 0 for _, in_features in linears.values())
    }


def expected_savings(
    tensors: dict[str, TensorInfo], config: dict[str, Any]
) -> dict[str, dict[str, dict[str, int]]]:
    """Return the bytes that quantizing more than the language model takes off `expected_bytes`.

    Returns
    -------
    dict
        ``g<group size>`` -> ``token_embeddings`` or ``vision_<part>`` -> bits -> bytes, for what the
        group size divides.
    """
    parts: dict[str, dict[str, layout.Shape]] = {
        "token_embeddings": {layout.EMBEDDINGS: layout.embeddings_shape(config)}
    }
    for name, shape in layout.vision_linears(config).items():
        parts.setdefault(f"vision_{layout.vision_part(name)}", {})[name] = shape
    savings: dict[str, dict[str, dict[str, int]]] = {}
    for group_size in layout.GROUP_SIZES:
        for part, modules in parts.items():
            if any(shape[1] % group_size for shape in modules.values()):
                continue
            table = part == "token_embeddings"
            after = layout.quantized_table_bytes if table else layout.quantized_bytes
            before = sum(tensors[f"{name}.weight"].nbytes for name in modules)
            savings.setdefault(f"g{group_size}", {})[part] = {
                str(bits): before
                - sum(after(shape, bits, group_size) for shape in modules.values())
                for bits in (layout.EMBEDDINGS_BITS if table else layout.VISION_BITS)
            }
    return savings
