"""Figures from files of embeddings: the loss by quantization, and how well a model searches."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from demo.training.score import max_sim, ndcg

KINDS = {"pages": "page/", "queries": "query/"}
DECIMALS = 8


def measure_losses(original: Path, quantized: Path) -> dict[str, float]:
    """Return the loss of the tokens of ``pages`` and of those of ``queries``.

    Parameters
    ----------
    original, quantized : Path
        Files of the stage `embed`, of the same data.

    Raises
    ------
    ValueError
        If they do not hold the same items.
    """
    before, after = load_file(original), load_file(quantized)
    if before.keys() != after.keys():
        raise ValueError(f"{original} and {quantized} hold other items")
    return {
        kind: token_loss({name: before[name] for name in before if name.startswith(prefix)}, after)
        for kind, prefix in KINDS.items()
    }


def token_loss(original: Mapping[str, Tensor], quantized: Mapping[str, Tensor]) -> float:
    """Return 1 - the mean cosine of all tokens of all items, each ``[tokens, dim]``."""
    cosines = torch.cat(
        [
            torch.cosine_similarity(tokens.double(), quantized[name].double(), dim=-1)
            for name, tokens in original.items()
        ]
    )
    return round(1 - float(cosines.mean()), DECIMALS)


def measure_search(embeddings: Path, dataset: Path) -> dict[str, float]:
    """Return nDCG@5 and recall@1 of a model on its own embeddings, and the sizes of the set.

    Parameters
    ----------
    embeddings : Path
        A file of the stage `embed`.
    dataset : Path
        The data embedded, a folder in the BEIR convention with ``qrels.tsv``.
    """
    items = load_file(embeddings)
    names = {
        kind: [name for name in items if name.startswith(prefix)] for kind, prefix in KINDS.items()
    }
    tokens = [items[name] for name in names["queries"]]
    queries = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(item) for item in tokens])
    mask = torch.arange(queries.shape[1]) < lengths[:, None]
    scores = torch.cat([max_sim(queries, mask, items[name][None]) for name in names["pages"]], 1)
    relevant = torch.zeros_like(scores, dtype=torch.bool)
    for row in _relevance(dataset / "qrels.tsv"):
        query, page = KINDS["queries"] + row[0], KINDS["pages"] + row[1]
        relevant[names["queries"].index(query), names["pages"].index(page)] = True
    return {**ndcg(scores, relevant), **{kind: len(group) for kind, group in names.items()}}


def _relevance(path: Path) -> list[list[str]]:
    lines = path.read_text("utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines if line.strip()]
    return [row for row in rows if float(row[2]) > 0]
