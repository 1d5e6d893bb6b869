"""Loads a model folder, original or quantized, as a serving runtime."""

import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch
from torch.nn import functional

from colqwen3.checkpoint.quantization import check_packing
from colqwen3.model.configuration_colqwen3 import ColQwen3Config
from colqwen3.model.loading import (
    as_user_error,
    load_processor,
    quantization_config,
)
from colqwen3.serving.int8 import ROTATED
from colqwen3.serving.runtime import Mode, Runtime
from colqwen3.serving.weights import Weights
from colqwen3.system.device import ActivationsKind
from colqwen3.system.files import read_json

logger = logging.getLogger(__name__)

MINIMUM_VISUAL_TOKENS = 4
INT8_CAPABILITY = (9, 0)
"""Of the GPUs that have what the int8 product loads its operands with, those that were tried."""


def load_runtime(
    folder: Path | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    mode: Mode = "graphs",
    max_num_visual_tokens: int = 1280,
    trust_remote_code: bool = False,
    activations: ActivationsKind = "bfloat16",
    time_activations: bool = True,
) -> Runtime:
    """Load a ColQwen3 folder, original or quantized here, ready to serve.

    Weights go to the device tensor by tensor; 4-bit ones stay so when a kernel for them is
    installed and agrees with their dequantized values, which is tried once here. Where something
    is missing, a warning says what, and what it costs.

    Parameters
    ----------
    folder
        The model.
    device
        Default: the GPU when there is one.
    dtype
        Of the arithmetic. Default: bfloat16 on a GPU, otherwise whichever of float32 and bfloat16 this
        processor multiplies faster.
    mode
        ``graphs``: fused kernels, and a CUDA graph for each size of query batch; ``compiled``;
        ``eager``. The last two are for comparison.
    max_num_visual_tokens
        A page is shrunk until it has at most this many.
    trust_remote_code
        Whether Python files of the folder may run (its tokenizer's).

    activations
        What the decoder's linears take: ``bfloat16``, that is those of `dtype`, or ``int8``: one
        scale a token, for batches of more than 64 tokens. Where int8 does not work, a warning says
        why. Weights that the int8 kernels cannot take as humming keeps them, as those of an
        original, are kept in 8 bits beside. On a CPU nothing gets faster: it shows about what the
        embeddings are.
    time_activations
        Whether int8 is used on a GPU only for as many tokens as it was timed to be faster for. Else
        it always is beyond 64 tokens, so that embeddings do not depend on times.

    Notes
    -----
    On a GPU, embeddings of packed weights differ from run to run, about as much as bfloat16 rounds,
    unless `colqwen3.system.device.make_deterministic` was called before: then tiles of products are
    not split.

    Raises
    ------
    UserError
        If the folder is damaged, not a ColQwen3, or packed in another way than quantization here.
    ValueError
        If an argument is out of range.
    """
    folder = Path(folder)
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}; give one of {', '.join(get_args(Mode))}")
    if activations not in get_args(ActivationsKind):
        raise ValueError(
            f"activations is {activations!r}; give one of {', '.join(get_args(ActivationsKind))}"
        )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; give one of torch, as torch.bfloat16")
    if max_num_visual_tokens < MINIMUM_VISUAL_TOKENS:
        raise ValueError(f"max_num_visual_tokens is {max_num_visual_tokens}; give at least 4")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(place)!r}, but torch sees no GPU; give 'cpu'")
    quantization = quantization_config(folder)
    chosen = dtype or (torch.bfloat16 if place.type == "cuda" else faster_dtype())
    processor = load_processor(folder, max_num_visual_tokens, trust_remote_code)
    with as_user_error(folder):
        with torch.device("cpu"):
            raw = read_json(folder / "config.json", "fetch it again")
            config = ColQwen3Config.from_dict(raw)
            if quantization is not None:
                check_packing(quantization)
            problem = int8_problem(place, chosen, config) if activations == "int8" else None
            if problem:
                logger.warning("%s: 16-bit activations are used", problem)
                activations = "bfloat16"
            weights = Weights(folder, place, chosen, raw, activations == "int8")
            runtime = Runtime(
                config, processor, weights, place, chosen, activations, time_activations
            )
        runtime.use(mode)  # outside of torch.device, which compiled code would be bound to
    return runtime


def int8_problem(device: torch.device, dtype: torch.dtype, config: ColQwen3Config) -> str | None:
    """Return what keeps a device or a model from 8-bit activations, or None."""
    text = config.text_config
    heads = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    widths = (text.hidden_size, heads, keys, text.intermediate_size)
    if any(width % ROTATED for width in widths):
        return f"8-bit activations need {ROTATED} to divide the widths {widths} of the linears"
    if device.type == "cpu":
        return None
    missing = [name for name in ("humming", "triton") if find_spec(name) is None]
    if missing:
        return f"8-bit activations need {missing[0]} (extra gpu of colqwen3-autoround)"
    if dtype != torch.bfloat16:
        return f"8-bit activations need bfloat16 beside them, not {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability != INT8_CAPABILITY:  # others may have another layout of weights
        card, (major, minor) = torch.cuda.get_device_name(device), capability
        return (
            f"8-bit activations need compute capability 9.0 (H100), and {card} has {major}.{minor}"
        )
    return None


def faster_dtype(features: int = 2048, tokens: int = 26) -> torch.dtype:
    """Return float32 or bfloat16, whichever a query's linear takes less time in on this CPU."""
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (
            torch.ones(tokens, features, dtype=dtype),
            torch.ones(features, features, dtype=dtype),
        )
        functional.linear(x, weight)
        start = time.perf_counter()
        for _ in range(5):
            functional.linear(x, weight)
        taken[dtype] = time.perf_counter() - start
    return min(taken, key=taken.__getitem__)
