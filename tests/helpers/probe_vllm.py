"""Embed with vLLM and a model folder alone, in the environment of vLLM; keep the embeddings.

    python probe_vllm.py FOLDER INPUTS OUT.safetensors DTYPE

INPUTS has queries.json (id -> text) and pages/*.png. Prompts come from the folder's chat template.
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer
from vllm import LLM

PAGE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>"
AUGMENTATION = "<|endoftext|>" * 10


def main() -> None:
    folder, inputs, out, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    model = LLM(
        folder, runner="pooling", enforce_eager=True, dtype=dtype, max_model_len=2048,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )  # fmt: skip
    has_template = AutoTokenizer.from_pretrained(folder).chat_template is not None

    def prompt(part: dict[str, str]) -> str:
        if not has_template:  # a published folder
            return PAGE if part["type"] == "image" else part["text"].strip() + AUGMENTATION
        tokenizer = AutoTokenizer.from_pretrained(folder)
        message = {"role": "user", "content": [part]}
        return str(tokenizer.apply_chat_template([message], tokenize=False))

    queries = json.loads((inputs / "queries.json").read_text(encoding="utf-8"))
    prompts: dict[str, Any] = {
        f"query/{key}": {"prompt": prompt({"type": "text", "text": text})}
        for key, text in queries.items()
    }
    for path in sorted((inputs / "pages").glob("*.png")):
        prompts[f"page/{path.stem}"] = {
            "prompt": prompt({"type": "image"}),
            "multi_modal_data": {"image": Image.open(path)},
        }
    results = model.encode(list(prompts.values()), pooling_task="token_embed")
    vectors = {
        key: result.outputs.data.float().contiguous()
        for key, result in zip(prompts, results, strict=True)
    }
    save_file(vectors, out)


if __name__ == "__main__":
    main()
