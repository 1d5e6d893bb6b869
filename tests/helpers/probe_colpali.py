"""Embed with colpali-engine's own ColQwen3, in an environment of its own; keep what came out.

    python probe_colpali.py FOLDER INPUTS OUT.safetensors

INPUTS has queries.json (id -> text) and pages/*.png. Token pooling and similarity maps run on the
first page. Queries are given without surrounding space and transparent pages are left out: that
library does not strip the ones and puts the others on black.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from colpali_engine.compression.token_pooling import HierarchicalTokenPooler
from colpali_engine.interpretability import get_similarity_maps_from_embeddings
from colpali_engine.models import ColQwen3, ColQwen3Processor
from PIL import Image
from safetensors.torch import save_file


def main() -> None:
    folder, inputs, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    model, info = ColQwen3.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    lost = {key: sorted(map(str, names)) for key, names in info.items() if names}
    model.eval()
    processor = ColQwen3Processor.from_pretrained(folder)
    queries = json.loads((inputs / "queries.json").read_text(encoding="utf-8"))
    vectors: dict[str, Any] = {}
    pages: list[Any] = []
    with torch.inference_mode():
        for key, text in queries.items():
            vectors[f"query/{key}"] = model(**processor.process_queries([text.strip()]))[0].float()
        for path in sorted((inputs / "pages").glob("*.png")):
            opened = Image.open(path)
            if opened.has_transparency_data:
                continue
            image = opened.convert("RGB")
            batch = processor.process_images([image])
            vectors[f"page/{path.stem}"] = model(**batch)[0].float()
            pages.append((image, batch, vectors[f"page/{path.stem}"]))
    image, batch, page = pages[0]
    pooled = HierarchicalTokenPooler().pool_embeddings([page], pool_factor=3)[0]
    n_patches = processor.get_n_patches(image.size, spatial_merge_size=model.spatial_merge_size)
    query = next(iter(vectors.values()))
    (maps,) = get_similarity_maps_from_embeddings(
        page[None], query[None], n_patches, processor.get_image_mask(batch)
    )
    save_file({key: each.contiguous() for key, each in vectors.items()}, out)
    facts = {
        "lost": lost, "tokens": len(page), "pooled": len(pooled), "map": list(maps.shape),
        "best": float(maps.max()),
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
