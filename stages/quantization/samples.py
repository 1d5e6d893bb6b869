"""The calibration samples on disk: one safetensors file each, and an index of their origins."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from colqwen3.system.errors import UserError, first_line
from colqwen3.system.files import read_json

INDEX = "index.json"


@dataclass(frozen=True)
class Origin:
    """Where one calibration sample comes from.

    Attributes
    ----------
    kind
        ``query``, ``page`` or ``passage``.
    id
        The ``_id`` of the query or passage, or the file name of the page.
    tokens
        Its length in tokens.
    file
        The safetensors file that holds its tensors.
    """

    kind: str
    id: str
    tokens: int
    file: str


def read_samples(folder: Path) -> tuple[list[Origin], list[dict[str, torch.Tensor]]]:
    """Read the calibration samples and their origins, in the order they were drawn.

    Raises
    ------
    UserError
        If the folder is missing or damaged.
    """
    fix = "run `dvc repro -f calibrate`"
    index = read_json(folder / INDEX, fix)
    try:
        origins = [Origin(**entry) for entry in index["samples"]]
        return origins, [load_file(folder / origin.file) for origin in origins]
    except Exception as error:  # safetensors raises its own type, damaged JSON several
        reason = first_line(error)
        raise UserError(f"{folder}: calibration samples cannot be read ({reason}); {fix}") from None
