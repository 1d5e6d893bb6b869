"""vLLM's ColQwen3 drops the bias of its projection: python vllm_colqwen3_bias.py MODEL_FOLDER."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Qwen3VLConfig, Qwen3VLModel
from vllm import LLM

QUERY = "total of the invoice"

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    llm = LLM(str(folder), runner="pooling", enforce_eager=True, dtype="float32", max_model_len=512)
    (output,) = llm.encode([QUERY], pooling_task="token_embed")
    actual = output.outputs.data.float()

    stored = {}
    for path in folder.glob("*.safetensors"):
        stored.update({name: tensor.float() for name, tensor in load_file(path).items()})
    weight, bias = (stored.pop(f"embedding_proj_layer.{part}") for part in ("weight", "bias"))
    published = json.loads((folder / "config.json").read_text())
    parts = {key: published[key] for key in ("text_config", "vision_config", "image_token_id")}
    config = Qwen3VLConfig(**parts)
    backbone = Qwen3VLModel(config).eval().float()
    names = {name.removeprefix("vlm.model."): tensor for name, tensor in stored.items()}
    backbone.load_state_dict({name: names[name] for name in backbone.state_dict()})
    with torch.no_grad():
        ids = torch.tensor([output.prompt_token_ids])
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
    for label, vectors in (
        ("with the bias", hidden @ weight.T + bias),
        ("without it", hidden @ weight.T),
    ):
        cosines = torch.cosine_similarity(actual, vectors, dim=-1)
        print(f"{label}: minimum cosine of a token with vLLM's {float(cosines.min()):.6f}")
