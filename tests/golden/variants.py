"""Rewrite the golden checkpoint with other tensor names that a loader has to accept.

This module needs safetensors and torch only, not transformers, so tests may import it under any
version. The weights never change: every variant must give the embeddings of `golden.safetensors`.

    python tests/golden/variants.py --variant legacy --output /some/empty/folder

Variants:

- `legacy`: `model.visual.*`, `model.language_model.*` and `custom_text_proj.*`.
- `legacy-bare`: `visual.*` and `language_model.*`; the projection keeps its published name, so
  that each prefix has to be mapped on its own.
- `lm_head`: the published names plus a stored, untied `vlm.lm_head.weight`, as larger models of
  the family have it. The head plays no part in the embeddings.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file, save_file

Variant = Literal["legacy", "legacy-bare", "lm_head"]

MODEL_DIR = Path(__file__).resolve().parent / "model"
INDEX_NAME = "model.safetensors.index.json"

_PREFIXES: dict[Variant, dict[str, str]] = {
    "legacy": {"vlm.model.": "model.", "embedding_proj_layer.": "custom_text_proj."},
    "legacy-bare": {"vlm.model.": ""},
    "lm_head": {},
}


def _rename(name: str, variant: Variant) -> str:
    """Return the name that a published tensor has in a variant."""
    for old, new in _PREFIXES[variant].items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _add_untied_head(target: Path, weight_map: dict[str, str]) -> int:
    """Store a head of its own in one more shard and return its size in bytes."""
    embedding_name = "vlm.model.language_model.embed_tokens.weight"
    embedding = load_file(target / weight_map[embedding_name])[embedding_name]
    # Reversed rows: a head that a loader wrongly ties to the embedding (or the other way round)
    # then differs from what is stored.
    head = torch.flip(embedding, dims=[0]).contiguous()
    shard = "model-lm-head.safetensors"
    save_file({"vlm.lm_head.weight": head}, target / shard, metadata={"format": "pt"})
    weight_map["vlm.lm_head.weight"] = shard

    config_path = target / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["text_config"]["tie_word_embeddings"] = False
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return head.numel() * head.element_size()


def write_variant(variant: Variant, target: Path, source: Path = MODEL_DIR) -> Path:
    """Copy the golden checkpoint into `target` with the tensor names of `variant`.

    Args:
        variant: Which names to write.
        target: Folder to create; it must not hold a checkpoint yet.
        source: Checkpoint in the published layout.

    Returns:
        `target`, ready to be loaded.
    """
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            tensors = {_rename(name, variant): tensor for name, tensor in load_file(path).items()}
            save_file(tensors, target / path.name, metadata={"format": "pt"})
        elif path.name != INDEX_NAME:
            shutil.copyfile(path, target / path.name)

    index = json.loads((source / INDEX_NAME).read_text(encoding="utf-8"))
    weight_map = {_rename(name, variant): shard for name, shard in index["weight_map"].items()}
    if variant == "lm_head":
        index["metadata"]["total_size"] += _add_untied_head(target, weight_map)
        # Optional in the format, and no longer right: drop it rather than keep a wrong figure.
        index["metadata"].pop("total_parameters", None)
    index["weight_map"] = weight_map
    (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return target


def main() -> None:
    """Write one variant from the command line."""
    parser = argparse.ArgumentParser(description="Write a variant of the golden checkpoint.")
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--output", type=Path, required=True, help="empty or new folder")
    arguments = parser.parse_args()
    write_variant(arguments.variant, arguments.output)


if __name__ == "__main__":
    main()
