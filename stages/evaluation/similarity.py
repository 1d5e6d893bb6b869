"""Which query and page a heat map is drawn of, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings
from colqwen3.system.errors import UserError
from stages.evaluation.retrieval import finite_scores

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
