"""The demo model with vectors of 320 numbers, as the 4B model has: zeros are added to its 128."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WIDTH = 320


def widen(source: Path, target: Path) -> Path:
    """Write a model folder, original or quantized, whose projection has `WIDTH` rows."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            shutil.copyfile(path, target / path.name)
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors.update(load_file(path))
    for part in ("weight", "bias"):
        name = f"embedding_proj_layer.{part}"
        rows = tensors[name]
        zeros = torch.zeros(WIDTH - len(rows), *rows.shape[1:], dtype=rows.dtype)
        tensors[name] = torch.cat([rows, zeros])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "embed_dim": WIDTH}))
    return target
