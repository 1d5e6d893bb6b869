"""What an index format costs beside what 4-bit weights cost: bytes, nDCG@5, top-5 overlap.

Queries stay as they are; pages go through the format and are scored by MaxSim of what it keeps,
without any approximate search of a store.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from colqwen3.corpus.formats import FORMATS, decode, encode
from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings
from colqwen3.model.scoring import BATCH
from stages.evaluation.retrieval import Run, finite, measure, overlap, search

DEPTH = 5
EXACT = "float32"
"""The format that the others are compared with: the embeddings as they are."""


def compare_formats(
    dataset: Dataset, original: Embeddings, quantized: Embeddings, formats: Sequence[str]
) -> dict[str, Any]:
    """Return what each format does to retrieval by each model.

    Parameters
    ----------
    dataset, original, quantized
        As `comparison.evaluate` takes them.
    formats
        Names of `FORMATS`.

    Returns
    -------
    dict
        Format -> ``bytes_per_page``, the mean, and ``original`` and ``quantized``: ``ndcg_at_5``
        and ``top5_overlap`` with the exact search of the original. ``float32`` is always there.
    """
    names, stems = tuple(dataset.queries), tuple(dataset.pages)
    sides = {"original": original, "quantized": quantized}
    queries = {
        side: [finite(embeddings.queries[name]) for name in names]
        for side, embeddings in sides.items()
    }
    wanted = list(dict.fromkeys([EXACT, *formats]))
    runs = {
        (name, side): Run(names, stems, np.empty((len(names), len(stems)), dtype=np.float32))
        for name in wanted
        for side in sides
    }
    sizes = dict.fromkeys(wanted, 0)
    for start in range(0, len(stems), BATCH):
        batch = stems[start : start + BATCH]
        for side, embeddings in sides.items():
            pages = [finite(embeddings.pages[stem]) for stem in batch]
            for name in wanted:
                stored, size = _stored(pages, name)
                scores = search(queries[side], stored)
                runs[name, side].scores[:, start : start + BATCH] = scores
                sizes[name] += size if side == "original" else 0
    exact = runs[EXACT, "original"]
    return {
        name: {
            "bytes_per_page": round(sizes[name] / len(stems)),
            **{side: _figures(runs[name, side], exact, dataset.relevance) for side in sides},
        }
        for name in wanted
    }


def _stored(pages: Sequence[torch.Tensor], name: str) -> tuple[list[torch.Tensor], int]:
    """Return what a format keeps of pages, and the bytes that it takes."""
    format_ = FORMATS[name]
    encoded = [encode(page, format_) for page in pages]
    return [decode(page, format_.kind) for page in encoded], sum(page.bytes for page in encoded)


def _figures(run: Run, exact: Run, relevance: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    return {
        "ndcg_at_5": float(measure(run, relevance)["ndcg_at_5"].mean()),
        "top5_overlap": overlap(exact, run, DEPTH),
    }
