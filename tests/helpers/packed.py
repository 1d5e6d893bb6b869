"""Quantized models as transformers loads them, with packed weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from colqwen3.checkpoint.headers import read_headers
from colqwen3.model.loading import as_user_error


def load_packed(
    folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Any:
    """Load a quantized model as transformers does, with the kernel auto-round picks for `device`.

    The kernel may force a dtype of its own: read ``model.dtype``.

    Raises
    ------
    UserError
        If the folder cannot be loaded.
    """
    read_headers(folder)
    with as_user_error(folder):
        model = AutoModel.from_pretrained(
            folder, dtype=dtype, device_map=str(device), trust_remote_code=trust_remote_code
        )
    return model.eval()
