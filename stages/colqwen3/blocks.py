"""A ColQwen3 one decoder layer at a time, so that the whole model is never in memory."""

from pathlib import Path
from typing import Any

import torch

from stages.checkpoint import TensorInfo, read_used_headers
from stages.colqwen3 import ColQwen3, ColQwen3Config
from stages.colqwen3.loading import as_pipeline_error, check_finite
from stages.files import read_json
from stages.layout import BLOCKS
from stages.tensors import read_tensor


def load_front(folder: Path, dtype: torch.dtype, device: torch.device) -> ColQwen3:
    """Load all of a model that comes before its second decoder layer, in evaluation mode.

    Running it up to the first decoder layer gives the inputs of that layer.

    Raises
    ------
    PipelineError
        If a file is damaged, or the tensors are not those of a ColQwen3.
    """
    raw = read_json(folder / "config.json", "give a complete model folder")
    raw["text_config"]["num_hidden_layers"] = 1
    first = f"{BLOCKS}.0."
    state = {
        name: read_tensor(folder, tensor)
        for name, tensor in read_used_headers(folder).items()
        if not name.startswith(f"{BLOCKS}.") or name.startswith(first)
    }
    with as_pipeline_error(folder):
        config = ColQwen3Config.from_dict(raw)
        model = ColQwen3.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        check_finite(model)
    front: ColQwen3 = model.eval().to(device)
    return front


def load_block(
    folder: Path, tensors: dict[str, TensorInfo], front: ColQwen3, index: int, dtype: torch.dtype
) -> Any:
    """Load one decoder layer on the CPU, in evaluation mode.

    Parameters
    ----------
    folder
        The model folder.
    tensors
        Its tensors by published name.
    front
        What `load_front` returned; gives the layer's class and config.
    index
        Number of the layer, from 0.
    dtype
        Of the weights.

    Raises
    ------
    PipelineError
        If a tensor is missing, unknown, or holds NaN or infinite weights.
    """
    text = front.vlm.model.language_model
    prefix = f"{BLOCKS}.{index}."
    state = {
        name.removeprefix(prefix): read_tensor(folder, tensor).to(dtype)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    with as_pipeline_error(folder):
        with torch.device("meta"):  # no weights are made up only to be replaced
            block = type(text.layers[0])(text.config, layer_idx=index)
        block.load_state_dict(state, assign=True)
        check_finite(block, prefix)
    return block.eval()
