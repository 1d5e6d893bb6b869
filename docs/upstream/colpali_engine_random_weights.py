"""colpali-engine's ColQwen3 builds a random model from a published ColQwen3: python ... MODEL_FOLDER."""

import json
import sys
from pathlib import Path

import torch
from colpali_engine.models import ColQwen3
from safetensors import safe_open
from transformers.models.qwen3_vl import Qwen3VLConfig

folder = Path(sys.argv[1])
published = json.loads((folder / "config.json").read_text())
config = Qwen3VLConfig.from_pretrained(folder)  # what ColQwen3.from_pretrained does first
print("layers in config.json:", published["text_config"]["num_hidden_layers"])
print("layers that are built:", config.text_config.num_hidden_layers)
with torch.device("meta"):  # no memory
    expected = set(ColQwen3(config).state_dict())
stored = set()
for path in folder.glob("*.safetensors"):
    with safe_open(path, framework="pt") as file:
        stored.update(file.keys())
print("weights that the checkpoint fills:", len(expected & stored), "of", len(expected))
