"""Embed page images and queries with a saved demonstration model, and rank a page set."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from demo.training.network import CELL, MAX_CELLS, Retriever
from demo.training.score import max_sim, ndcg
from demo.training.tokenizer import AUGMENTATION


def load(folder: Path) -> tuple[Retriever, Tokenizer]:
    """Load a saved model in float32, with its tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Retriever(json.loads((folder / "config.json").read_text("utf-8")), tokenizer)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    return model.eval(), tokenizer


@torch.no_grad()
def embed_page(model: Retriever, image: Image.Image) -> Tensor:
    """Return the unit embeddings ``[tokens, dim]`` of one page.

    The page is resized as the published processor does: sides to multiples of 32, at most 1,280
    cells.  The model's filters are equal for all colours, so their mean is all it needs.
    """
    height, width = smart_resize(
        image.height, image.width, CELL, 4 * CELL * CELL, MAX_CELLS * CELL * CELL
    )
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    grey = np.asarray(resized, np.float32).mean(-1)
    return model.pages(torch.from_numpy(grey)[None] / 127.5 - 1)[0][0]


@torch.no_grad()
def embed_query(model: Retriever, tokenizer: Tokenizer, text: str) -> Tensor:
    """Return the unit embeddings ``[tokens, dim]`` of one query with its augmentation tokens."""
    ids = tokenizer.encode(text.strip()).ids + [model.pad] * AUGMENTATION
    return model.queries(torch.tensor([ids]))[0]


def score(pages: list[Tensor], queries: list[Tensor]) -> Tensor:
    """Return the MaxSim scores ``[queries, pages]`` of separately embedded pages and queries."""
    rows = []
    for query in queries:
        mask = torch.ones(1, len(query), dtype=torch.bool)
        rows.append(torch.cat([max_sim(query[None], mask, page[None])[0] for page in pages]))
    return torch.stack(rows)


def rank_set(model: Retriever, tokenizer: Tokenizer, folder: Path) -> dict[str, float]:
    """Rank a page set in the BEIR convention (``corpus``, ``queries.jsonl``, ``qrels.tsv``)."""
    names = sorted(path.stem for path in (folder / "corpus").glob("*.png"))
    pages = [embed_page(model, Image.open(folder / "corpus" / f"{n}.png")) for n in names]
    lines = (folder / "queries.jsonl").read_text("utf-8").splitlines()
    asked = {row["_id"]: row["text"] for row in map(json.loads, lines)}
    relevant = torch.zeros(len(asked), len(names), dtype=torch.bool)
    order = list(asked)
    for line in (folder / "qrels.tsv").read_text("utf-8").splitlines()[1:]:
        query, page, _ = line.split("\t")
        relevant[order.index(query), names.index(page)] = True
    scores = score(pages, [embed_query(model, tokenizer, text) for text in asked.values()])
    return {**ndcg(scores, relevant), "pages": len(names), "queries": len(order)}
