"""Search of a collection by original and 4-bit, with what `colqwen3 embed-corpus` has written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from colqwen3.checkpoint.hub import find_model
from colqwen3.corpus.formats import FORMATS, decode
from colqwen3.corpus.job import MANIFEST, model_digest
from colqwen3.corpus.shards import read_sources, read_vectors
from colqwen3.dataset.pages import open_page
from colqwen3.embedding.embedder import Embedder, embed_texts, load_embedder
from colqwen3.model.scoring import max_sim
from colqwen3.search.maps import overlay, similarity_map, visual_tokens
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json

BATCH = 16  # queries embedded at a time
FIX = "run `colqwen3 embed-corpus` with this model"


@dataclass(frozen=True)
class Hit:
    """A page that was found.

    Attributes
    ----------
    id
        Of the page.
    score
        Its MaxSim.
    """

    id: str
    score: float


@dataclass(frozen=True)
class Change:
    """A query whose first page is another one by the quantized model."""

    query: str
    text: str
    original: str
    quantized: str


class Side:
    """A model and its vectors of a collection, which are held in memory.

    Parameters
    ----------
    model
        Folder or Hub id.
    vectors
        Folder of shards, made with this model.
    device
        Where queries are embedded.

    Raises
    ------
    UserError
        If either cannot be read, or the vectors are of another model.
    """

    def __init__(self, model: str, vectors: Path, device: torch.device) -> None:
        folder = find_model(model)
        path = vectors / MANIFEST
        settings = read_json(path, FIX).get("settings", {})
        if settings.get("model") != model_digest(folder):
            raise UserError(f"{path}: is of another model than {model}; {FIX}")
        self.format = FORMATS[settings["format"]]
        self.embedder: Embedder = load_embedder(
            folder, torch.float32, device, settings["max_num_visual_tokens"]
        )
        self.pages = {
            id_: decode(stored, self.format.kind).half() for id_, stored in read_vectors(vectors)
        }
        self.files = read_sources(vectors)

    def embed(self, texts: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Return the vectors [tokens, embed_dim] of queries."""
        parts = embed_texts(self.embedder, texts, BATCH)
        return {name: vectors for part in parts for name, vectors in part.items()}

    def find(self, query: torch.Tensor, count: int) -> list[Hit]:
        """Return the best pages of a query, the best first."""
        return self.find_all([query], count)[0]

    def find_all(self, queries: Sequence[torch.Tensor], count: int) -> list[list[Hit]]:
        """Return the best pages of each query; equal scores in the order of the shards."""
        ids = list(self.pages)
        scores = max_sim(queries, list(self.pages.values()))
        order = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :count]
        return [
            [Hit(ids[column], float(row[column])) for column in columns]
            for row, columns in zip(scores, order, strict=True)
        ]

    def picture(self, query: torch.Tensor, id_: str, height: int) -> Image.Image:
        """Return a page with its cells coloured by how well they match the query.

        A page whose vectors are pooled has no cells, and is returned as it is.
        """
        page = open_page(self.files[id_])
        if self.format.pool > 1:
            page.thumbnail((height, height))
            return page
        visual, grid = visual_tokens(self.embedder.processor, page)
        values = similarity_map(query, self.pages[id_], visual, grid)
        return overlay(page, values, float(np.median(values)), float(values.max()), height)


class Comparison:
    """Original and quantized model over the same collection.

    Parameters
    ----------
    original, quantized
        The two; their pages must be the same.

    Raises
    ------
    UserError
        If they are not.
    """

    def __init__(self, original: Side, quantized: Side) -> None:
        if missing := sorted(original.pages.keys() ^ quantized.pages.keys()):
            raise UserError(
                f"page {missing[0]!r} has vectors of one model only; embed the same pages with both"
            )
        self.sides = {"original": original, "quantized": quantized}

    def search(self, text: str, count: int) -> dict[str, tuple[torch.Tensor, list[Hit]]]:
        """Return, for each side, the vectors of a query and its best pages."""
        results = {}
        for name, side in self.sides.items():
            query = side.embed({"query": text})["query"]
            results[name] = query, side.find(query, count)
        return results

    def changes(self, queries: Mapping[str, str]) -> list[Change]:
        """Return the queries whose first page differs between the sides, in their order."""
        first: dict[str, list[Any]] = {}
        for name, side in self.sides.items():
            vectors = side.embed(queries)
            first[name] = [hits[0].id for hits in side.find_all(list(vectors.values()), 1)]
        pairs = zip(queries.items(), first["original"], first["quantized"], strict=True)
        return [Change(*query, one, other) for query, one, other in pairs if one != other]
