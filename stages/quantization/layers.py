"""A ColQwen3 one decoder layer at a time, so that the whole model is never in memory."""

from typing import Any

import torch

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import BLOCKS
from colqwen3.checkpoint.tensor_file import read_tensor
from colqwen3.model import ColQwen3, ColQwen3Config
from colqwen3.model.loading import as_user_error, check_finite
from colqwen3.system.files import read_json


def load_front(source: Checkpoint, dtype: torch.dtype, device: torch.device) -> ColQwen3:
    """Load all of a model that comes before its second decoder layer, in evaluation mode.

    Running it up to the first decoder layer gives the inputs of that layer.

    Raises
    ------
    UserError
        If a file is damaged, or the tensors are not those of a ColQwen3.
    """
    raw = read_json(source.folder / "config.json", "give a complete model folder")
    raw["text_config"]["num_hidden_layers"] = 1
    first = f"{BLOCKS}.0."
    state = {
        name: read_tensor(source.folder, tensor)
        for name, tensor in source.tensors.items()
        if not name.startswith(f"{BLOCKS}.") or name.startswith(first)
    }
    with as_user_error(source.folder):
        config = ColQwen3Config.from_dict(raw)
        model = ColQwen3.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        check_finite(model)
    front: ColQwen3 = model.eval().to(device)
    return front


def load_layer(source: Checkpoint, front: ColQwen3, index: int, dtype: torch.dtype) -> Any:
    """Load one decoder layer on the CPU, in evaluation mode.

    Parameters
    ----------
    source
        The model.
    front
        What `load_front` returned; gives the layer's class and config.
    index
        Number of the layer, from 0.
    dtype
        Of the weights.

    Raises
    ------
    UserError
        If a tensor is missing, unknown, or holds NaN or infinite weights.
    """
    text = front.vlm.model.language_model
    prefix = f"{BLOCKS}.{index}."
    state = {
        name.removeprefix(prefix): read_tensor(source.folder, tensor).to(dtype)
        for name, tensor in source.tensors.items()
        if name.startswith(prefix)
    }
    with as_user_error(source.folder):
        with torch.device("meta"):  # no weights are initialised only to be replaced
            layer = type(text.layers[0])(text.config, layer_idx=index)
        layer.load_state_dict(state, assign=True)
        check_finite(layer, prefix)
    return layer.eval()
