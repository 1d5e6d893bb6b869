"""The same quantized weights in the formats of other libraries.

``auto_gptq`` is read by transformers through optimum and gptqmodel, ``llm_compressor`` by
compressed-tensors. Codes and scales stay the same numbers; only their layout and names change.
The projection is stored as `colqwen3.release.projection` says, in every format.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.headers import SINGLE, Spec, TensorInfo, read_headers
from colqwen3.checkpoint.layout import BLOCKS, VISION
from colqwen3.checkpoint.packing import PACKED_TENSORS
from colqwen3.checkpoint.quantization import linear_bits
from colqwen3.checkpoint.tensor_file import TensorFile, read_tensor
from colqwen3.release.projection import (
    released_config,
    released_name,
    released_specs,
    write_guard,
    write_released,
)
from colqwen3.system.files import read_json, write_json

FIX = "run `dvc repro -f quantize`"
AUTO_ROUND, GPTQ, COMPRESSED = "auto_round", "auto_gptq", "llm_compressor"


def export_weights(checkpoint: Path, folder: Path, kind: str) -> None:
    """Write the weights of an ``auto_round`` checkpoint and its config as a released folder has them.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    folder
        Where the weights go; its config.json gets the format's ``quantization_config``.
    kind
        ``auto_round``, ``auto_gptq`` or ``llm_compressor``.

    Raises
    ------
    UserError
        If the checkpoint is damaged.
    """
    if kind == AUTO_ROUND:
        write_released(checkpoint, folder)
        return
    stored = read_headers(checkpoint)
    config = read_json(folder / "config.json", FIX)
    quantization = config["quantization_config"]
    linears = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    convert = _to_gptq if kind == GPTQ else _to_compressed
    describe = _describe_gptq if kind == GPTQ else _describe_compressed
    bits = {linear: linear_bits(quantization, linear) for linear in sorted(linears)}
    config["quantization_config"] = describe(quantization, bits, stored)

    converted = {
        f"{linear}.{part}": spec
        for linear in linears
        for part, spec in _specs(kind, linear, stored, bits[linear]).items()
    }
    packed = {f"{linear}.{part}" for linear in linears for part in PACKED_TENSORS}
    unchanged = {name: tensor for name, tensor in stored.items() if name not in packed}
    with TensorFile(folder / SINGLE, {**released_specs(unchanged), **converted}) as file:
        write_guard(file, unchanged)
        for name, tensor in unchanged.items():
            file.copy(released_name(name), checkpoint, tensor)
        for linear in linears:
            parts = {
                part: read_tensor(checkpoint, stored[f"{linear}.{part}"]) for part in PACKED_TENSORS
            }
            for part, value in convert(parts, bits[linear]).items():
                file.write(f"{linear}.{part}", value)
    write_json(folder / "config.json", released_config(config))
    if kind == GPTQ:
        write_json(folder / "quantize_config.json", config["quantization_config"])


def _specs(kind: str, linear: str, stored: dict[str, TensorInfo], bits: int) -> dict[str, Spec]:
    """Return the tensors of one linear in a format."""
    words, out_features = stored[f"{linear}.qweight"].shape
    groups = stored[f"{linear}.scales"].shape[0]
    if kind == GPTQ:
        same: dict[str, Spec] = {
            part: (stored[f"{linear}.{part}"].dtype, stored[f"{linear}.{part}"].shape)
            for part in PACKED_TENSORS
        }
        return {**same, "g_idx": ("I32", (words * 32 // bits,))}
    return {
        "weight_packed": ("I32", (out_features, words)),
        "weight_scale": ("F16", (out_features, groups)),
        "weight_shape": ("I64", (2,)),
    }


def _to_gptq(parts: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Add the group of each input: the packing is GPTQ's already."""
    in_features = parts["qweight"].shape[0] * 32 // bits
    group_size = in_features // parts["scales"].shape[0]
    return {**parts, "g_idx": torch.arange(in_features, dtype=torch.int32) // group_size}


def _to_compressed(parts: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Turn rows into columns: both formats pack along the inputs, lowest bits first, code plus half.

    The zero point is the middle in both, here by being left out.
    """
    packed = parts["qweight"].T.contiguous()
    shape = torch.tensor([packed.shape[0], packed.shape[1] * 32 // bits])
    return {
        "weight_packed": packed,
        "weight_scale": parts["scales"].T.contiguous(),
        "weight_shape": shape,
    }


def _describe_gptq(
    quantization: dict[str, Any], linears: Mapping[str, int], stored: dict[str, TensorInfo]
) -> dict[str, Any]:
    """Return the ``quantization_config`` that transformers, optimum and gptqmodel read."""
    inside = sorted({name.removeprefix(f"{BLOCKS}.").split(".", 1)[1] for name in linears})
    return {
        "quant_method": "gptq",
        "bits": quantization["bits"],
        "group_size": quantization["group_size"],
        "sym": True,
        "desc_act": False,
        "true_sequential": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "block_name_to_quantize": BLOCKS,
        "modules_in_block_to_quantize": [inside],
        # gptqmodel's own key for what stays 16-bit
        "dynamic": {r"-:.*\.visual\..*": {}, r"-:.*embedding_proj_layer.*": {}},
    }


def _describe_compressed(
    quantization: dict[str, Any], linears: Mapping[str, int], stored: dict[str, TensorInfo]
) -> dict[str, Any]:
    """Return the ``quantization_config`` that compressed-tensors reads, a group of it for each width."""
    dense = sorted(
        name.removesuffix(".weight")
        for name, tensor in stored.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    )
    groups: dict[str, Any] = {}
    for bits in sorted(set(linears.values())):
        groups[f"group_{len(groups)}"] = {
            "targets": _targets([name for name in linears if linears[name] == bits], linears),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": quantization["group_size"],
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
    }


def _targets(names: list[str], linears: Mapping[str, int]) -> list[str]:
    """Return regular expressions for the names of linears, one for all where they are all there are."""
    if len(set(linears.values())) == 1 and not any(name.startswith(VISION) for name in names):
        return [r"re:.*language_model.*layers\..*_proj$"]
    # other engines name the modules without the first part, and vLLM the layers' model once more
    paths = [re.escape(name.removeprefix("vlm.model.")) for name in names]
    inside = r"language_model\.", r"language_model\.(?:model\.)?"
    return [f"re:.*{path.replace(*inside)}$" for path in paths]
