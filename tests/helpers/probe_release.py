"""Embed with transformers and a released folder alone, as someone else would; keep the embeddings.

    python probe_release.py FOLDER INPUTS OUT.safetensors [DTYPE]

INPUTS holds queries.json (id -> text) and pages/*.png; without DTYPE the folder decides. It runs
under any supported version of transformers, and must not find this project's own package.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor


def main() -> None:
    folder, inputs, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if importlib.util.find_spec("stages"):
        sys.exit("error: this project's package can be imported; run elsewhere")
    dtype = {"dtype": getattr(torch, sys.argv[4])} if len(sys.argv) > 4 else {}
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **dtype).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    queries = json.loads((inputs / "queries.json").read_text(encoding="utf-8"))
    result = {f"query/{key}": processor.process_texts([text]) for key, text in queries.items()}
    for path in sorted((inputs / "pages").glob("*.png")):
        result[f"page/{path.stem}"] = processor.process_images([Image.open(path)])
    with torch.inference_mode():
        vectors = {key: model(**each).embeddings[0].float() for key, each in result.items()}
    save_file(vectors, out)
    facts = {
        "transformers": transformers.__version__,
        "classes": [type(each).__module__.split(".")[-1] for each in (model, processor)],
        "dtype": str(model.dtype),
        "architecture": type(model).__name__,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
