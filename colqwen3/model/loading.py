"""Loading a ColQwen3 from a folder, original or quantized, checked before any weight is read."""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, AutoProcessor

from colqwen3.checkpoint.headers import Checkpoint, read_headers, weight_files
from colqwen3.checkpoint.layout import EMBEDDINGS_KEY, MODEL_TYPE, published_name
from colqwen3.checkpoint.packing import ROWS, dequantize
from colqwen3.checkpoint.quantization import (
    check_bits,
    check_packing,
    embeddings_bits,
    linear_bits,
)
from colqwen3.checkpoint.tensor_file import DTYPES
from colqwen3.model import ColQwen3, ColQwen3Config, ColQwen3Processor
from colqwen3.model.modeling_colqwen3 import dequantize_rows
from colqwen3.system.errors import NonFiniteWeightsError, UserError, first_line
from colqwen3.system.files import read_json

logger = logging.getLogger(__name__)


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a model folder, None for an original.

    Raises
    ------
    UserError
        If config.json is missing or damaged, or the model is not a ColQwen3.
    """
    path = folder / "config.json"
    config = read_json(path, "give a complete model folder")
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        model_type = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: model_type is {model_type!r}; only {MODEL_TYPE!r} is supported")
    quantization: dict[str, Any] | None = config.get("quantization_config")
    return quantization


def load_processor(
    folder: Path, max_num_visual_tokens: int, trust_remote_code: bool = False
) -> ColQwen3Processor:
    """Load the processor of a model folder.

    Raises
    ------
    UserError
        If tokenizer or image-processor files are missing or damaged.
    """
    quantization_config(folder)  # rejects another model by name
    _warn_of_trust(folder, trust_remote_code)
    try:
        processor: ColQwen3Processor = AutoProcessor.from_pretrained(
            folder, max_num_visual_tokens=max_num_visual_tokens, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: processor cannot be loaded ({first_line(error)}); fetch the folder again "
            "(code of its own runs only with trust_remote_code)"
        ) from None
    if not processor.tokenizer("a")["input_ids"] or processor.image_token_id is None:
        raise UserError(
            f"{folder}: its tokenizer has no tokens for text or pages; fetch tokenizer.json again"
        )
    return processor


def load_model(
    folder: Path | str,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
) -> ColQwen3:
    """Load a model for embedding, in evaluation mode, with dense weights of `dtype`.

    Quantized weights are dequantized once: the embeddings are those of the 4-bit weights, free of
    a kernel's own rounding, and on a CPU dense weights are much faster than packed ones.

    Raises
    ------
    UserError
        If a file is damaged, or the tensors are not those of a ColQwen3.
    """
    folder = Path(folder)
    quantization = quantization_config(folder)
    read_headers(folder)
    _warn_of_trust(folder, trust_remote_code)
    with as_user_error(folder):
        if quantization is None:
            model = AutoModel.from_pretrained(
                folder, dtype=dtype, trust_remote_code=trust_remote_code
            )
        else:
            model = _dense_from_packed(folder, quantization, dtype)
        check_finite(model)
    loaded: ColQwen3 = model.eval().to(device)
    return loaded


def source_dtype(source: Checkpoint) -> torch.dtype:
    """Return the dtype of the stored weights, read from the headers (that of the projection).

    Raises
    ------
    UserError
        If the projection is missing.
    """
    projection = source.tensors.get("embedding_proj_layer.weight")
    if projection is not None:
        return DTYPES[projection.dtype]
    raise UserError(
        f"{source.folder}: lacks the tensor embedding_proj_layer.weight; fetch it again"
    )


def _dense_from_packed(folder: Path, quantization: dict[str, Any], dtype: torch.dtype) -> Any:
    """Build the model of an ``auto_round`` checkpoint with its weights dequantized."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = dict(dense_tensors(folder, raw, dtype))
    del raw["quantization_config"]
    raw.pop(EMBEDDINGS_KEY, None)
    config = ColQwen3Config.from_dict(raw)
    return ColQwen3.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def dense_tensors(
    folder: Path, config: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a quantized folder by its unquantized name, packed ones as `dtype`.

    Parameters
    ----------
    folder
        The folder.
    config
        Its config.json.
    dtype
        Of packed tensors once dequantized.

    Raises
    ------
    ValueError
        If a packing is another than quantization here writes, or config.json says other bits of a
        module than its tensors have.
    """
    quantization = config["quantization_config"]
    check_packing(quantization)
    stored = read_headers(folder)
    check_bits(quantization, stored)
    table_bits = embeddings_bits(config, stored)
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is not a dictionary
                module, _, kind = name.rpartition(".")
                if kind == "qweight":
                    zeros, scales = (
                        file.get_tensor(f"{module}.{part}") for part in ("qzeros", "scales")
                    )
                    bits = linear_bits(quantization, published_name(module))
                    dense = dequantize(file.get_tensor(name), zeros, scales, bits)
                    yield f"{module}.weight", dense.to(dtype)
                elif kind == "weight_packed":
                    scales = file.get_tensor(f"{module}.weight_scale")
                    table = dequantize_table(file.get_tensor(name), scales, table_bits, dtype)
                    yield f"{module}.weight", table
                elif kind not in ("qzeros", "scales", "weight_scale"):
                    yield name, file.get_tensor(name)


def _warn_of_trust(folder: Path, trust_remote_code: bool) -> None:
    if trust_remote_code:
        logger.warning("trust_remote_code is set: Python files of %s may run", folder)


def dequantize_table(
    packed: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return packed token embeddings as a dense table [rows, width] of `dtype`."""
    width = packed.shape[1] * 32 // bits
    table = torch.empty(len(packed), width, dtype=dtype)
    for start in range(0, len(packed), ROWS):
        part = slice(start, start + ROWS)
        table[part] = dequantize_rows(packed[part], scales[part], bits)
    return table


class NonFiniteError(ValueError):
    """A parameter of a module holds NaN or Inf."""


def check_finite(module: Any, prefix: str = "") -> None:
    """Reject parameters with NaN or Inf; `prefix` goes before their names in the error.

    Raises
    ------
    NonFiniteError
        Naming the first.
    """
    for name, parameter in module.named_parameters():
        # NaN passes through both; one pass without temporaries, 30 times faster than isfinite
        if not all(map(math.isfinite, parameter.detach().aminmax())):
            raise NonFiniteError(f"{prefix}{name} holds NaN or infinite weights")


@contextlib.contextmanager
def as_user_error(folder: Path) -> Iterator[None]:
    """Turn what transformers, torch and safetensors raise for a bad folder into a UserError.

    Raises
    ------
    UserError
        In place of their errors; a `NonFiniteWeightsError` where a weight is not finite.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteWeightsError(
            f"{folder}: {error}; fetch it again or quantize again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: model cannot be loaded ({first_line(error)}); fetch it again or quantize again"
        ) from None
