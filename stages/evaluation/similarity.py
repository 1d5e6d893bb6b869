"""Where on a page a query matches, by original and quantized.

Each cell of 32 x 32 pixels of the resized page, one visual token, is coloured by the score that the
page would get if it had that token alone, divided by the number of query tokens: the mean cosine of
the query's tokens (the augmentation tokens too, which MaxSim counts) with the cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings
from colqwen3.system.errors import UserError
from stages.evaluation.overlay import Map
from stages.evaluation.retrieval import finite, finite_scores

FIX = "run `dvc repro` to embed both again"


@dataclass(frozen=True)
class Choice:
    """A query, its best relevant page, and their scores by both models."""

    query: str
    page: str
    original: float
    quantized: float


def choose(dataset: Dataset, original: Embeddings, quantized: Embeddings) -> Choice:
    """Return the query whose score changed most, on the page that the original scores best.

    Only relevant pages count. Ties, to six decimal places, go to the first in the dataset.
    """
    choices = []
    for query, judged in dataset.relevance.items():
        pages = [page for page, score in judged.items() if score > 0]
        before = _scores(original, query, pages)
        best = before.index(max(before))
        after = _scores(quantized, query, pages[best : best + 1])
        choices.append(Choice(query, pages[best], before[best], after[0]))
    return max(choices, key=lambda choice: round(abs(choice.quantized - choice.original), 6))


def score(query: torch.Tensor, page: torch.Tensor) -> float:
    """Return the MaxSim of a query and a page, both [tokens, embed_dim]."""
    return float(finite_scores([query], [page])[0, 0])


def _scores(embeddings: Embeddings, query: str, pages: Sequence[str]) -> list[float]:
    scores = finite_scores([embeddings.queries[query]], [embeddings.pages[page] for page in pages])
    values: list[float] = scores[0].tolist()
    return values


def check_names(dataset: Dataset, **embeddings: Embeddings) -> None:
    """Check that the embeddings hold every query and page of the dataset.

    Raises
    ------
    UserError
        Naming the first that is missing.
    """
    for which, stored in embeddings.items():
        for kind, expected, names in (
            ("query", dataset.queries, stored.queries),
            ("page", dataset.pages, stored.pages),
        ):
            for name in expected:
                if name not in names:
                    raise UserError(f"{which} embeddings lack {kind} {name!r}; {FIX}")


def visual_tokens(processor: Any, page: Image.Image) -> tuple[NDArray[np.bool_], tuple[int, int]]:
    """Return which of a page's tokens are visual ones, and the rows and columns of their grid.

    The processor itself lays the page out: its visual tokens are those that carry the id of the
    image placeholder, in row-major order of the grid of patches merged 2 x 2.
    """
    from colqwen3.model.processing_colqwen3 import IMAGE_TOKEN

    inputs = processor.process_images([page])
    placeholder = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    _, height, width = inputs["image_grid_thw"][0].tolist()
    merge = processor.image_processor.merge_size
    visual: NDArray[np.bool_] = (inputs["input_ids"][0] == placeholder).numpy()
    return visual, (height // merge, width // merge)


def similarity_map(
    query: torch.Tensor, page: torch.Tensor, visual: NDArray[np.bool_], grid: tuple[int, int]
) -> Map:
    """Return the mean cosine of the query's tokens with each visual token, [rows, columns].

    Raises
    ------
    UserError
        If the page's embeddings have another number of tokens than the processor now gives it.
    """
    if len(page) != len(visual) or visual.sum() != grid[0] * grid[1]:
        raise UserError(
            f"the page of the heat map has {len(page)} embedded tokens, but {len(visual)} by the "
            f"processor; {FIX}"
        )
    similarities = finite(query).double() @ finite(page).double()[torch.from_numpy(visual)].T
    means: Map = similarities.mean(0).reshape(grid).numpy()
    return means
