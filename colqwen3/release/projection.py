"""How a released folder stores the projection, so that no engine computes without its bias.

vLLM's ColQwen3 class (0.30 to 0.33) drops the projection's bias when config.json has ``embed_dim``.
When it has none, the class takes the width from the first tensor of the projection whose name
contains ``weight``, gives the projection a bias if any tensor's name contains ``bias``, and keeps
the random bias it starts with if the stored one came before that tensor. So a released folder has

- the width as ``vector_dim`` instead of ``embed_dim``;
- the bias under a name that contains ``weight``: it may come first or last;
- between bias and weight, in the order of names and of places in the file, a guard of one number.
  Where the bias is missing the guard gives the projection a width of 1, which its weight does not
  have, and loading fails.

All three are in one file. Loaders here read both layouts, and reject a folder without the bias.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.headers import SINGLE, Checkpoint, Spec, TensorInfo
from colqwen3.checkpoint.layout import RELEASED_BIAS, RELEASED_GUARD, WIDTH_KEYS, vector_width
from colqwen3.checkpoint.tensor_file import DTYPES, TensorFile
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json, write_json

WEIGHT, BIAS = "embedding_proj_layer.weight", "embedding_proj_layer.bias"


def released_name(name: str) -> str:
    """Return the name in a released folder of a tensor of this published name."""
    return RELEASED_BIAS if name == BIAS else name


def released_specs(tensors: Mapping[str, TensorInfo]) -> dict[str, Spec]:
    """Return dtype and shape of tensors, published name -> entry, by their names in a released folder.

    Raises
    ------
    ValueError
        If weight or bias of the projection is missing, or they differ in dtype: a file is sorted
        by dtype first, which would part bias, guard and weight.
    """
    if not {WEIGHT, BIAS} <= tensors.keys():
        raise ValueError(f"lacks {WEIGHT if WEIGHT not in tensors else BIAS}")
    if tensors[WEIGHT].dtype != tensors[BIAS].dtype:
        raise ValueError(f"{WEIGHT} and {BIAS} differ in dtype")
    specs: dict[str, Spec] = {
        released_name(name): (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    return {**specs, RELEASED_GUARD: (tensors[WEIGHT].dtype, (1,))}


def write_guard(file: TensorFile, tensors: Mapping[str, TensorInfo]) -> None:
    """Write the guard into a file made by `released_specs`."""
    file.write(RELEASED_GUARD, torch.zeros(1, dtype=DTYPES[tensors[WEIGHT].dtype]))


def released_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json, as it was published, as a released folder has it."""
    rest = {key: value for key, value in config.items() if key not in WIDTH_KEYS}
    return {**rest, WIDTH_KEYS[1]: vector_width(config)}


def write_released(source: Path, target: Path) -> None:
    """Write weights and config.json of a model folder, original or quantized, as a released folder has them.

    Raises
    ------
    UserError
        If the folder is damaged, or the projection incomplete.
    """
    tensors = Checkpoint.read(source).tensors
    try:
        specs = released_specs(tensors)
        config = released_config(read_json(source / "config.json", "give a complete model folder"))
    except (KeyError, ValueError) as error:
        raise UserError(f"{source}: {error}; fetch it again") from None
    with TensorFile(target / SINGLE, specs) as file:
        for name, tensor in tensors.items():
            file.copy(released_name(name), source, tensor)
        write_guard(file, tensors)
    write_json(target / "config.json", config)
