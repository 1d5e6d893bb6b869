"""Retrieval figures from MaxSim scores, of the original and the quantized model side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
import torch
from ir_measures import R, nDCG
from numpy.typing import NDArray

from colqwen3.model.scoring import max_sim

Floats = NDArray[np.float64]
Relevance = Mapping[str, Mapping[str, int]]

MEASURES = {
    "ndcg_at_5": nDCG @ 5,
    "ndcg_at_10": nDCG @ 10,
    "recall_at_1": R @ 1,
    "recall_at_5": R @ 5,
}
RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Run:
    """Scores [queries, pages], float32 and finite, with the names of both axes."""

    queries: tuple[str, ...]
    pages: tuple[str, ...]
    scores: NDArray[np.float32]


def finite(tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens with those that hold NaN or Inf as zero vectors."""
    return tokens.masked_fill(~tokens.isfinite().all(-1, keepdim=True), 0)


def finite_scores(
    queries: Sequence[torch.Tensor], pages: Sequence[torch.Tensor]
) -> NDArray[np.float32]:
    """Return the MaxSim [queries, pages] with tokens that hold NaN or Inf as zero vectors."""
    scores = max_sim([finite(tokens) for tokens in queries], [finite(tokens) for tokens in pages])
    # a page without one finite token: max_sim gives -inf, plain arithmetic on zero vectors 0
    made: NDArray[np.float32] = torch.nan_to_num(scores, nan=0.0, neginf=0.0).numpy()
    return made


def measure(run: Run, relevance: Relevance) -> dict[str, Floats]:
    """Return nDCG@5, nDCG@10, recall@1 and recall@5 of each query, by ir_measures' trec_eval.

    nDCG has the relevance score itself as gain and log2(rank + 1) as discount. trec_eval compares
    scores as float32 and puts the page of the *greater* id (by code point) first where they tie,
    whatever the order of the pages; the float32 scores pass through unchanged, so ties stay ties.

    Raises
    ------
    KeyError
        If a query has no judgements.
    """
    judged = {query: dict(relevance[query]) for query in run.queries}
    scored = {
        query: dict(zip(run.pages, row, strict=True))
        for query, row in zip(run.queries, run.scores.tolist(), strict=True)
    }
    rows = {query: row for row, query in enumerate(run.queries)}
    names = {value: key for key, value in MEASURES.items()}
    values = {name: np.zeros(len(rows)) for name in MEASURES}
    for result in ir_measures.pytrec_eval.iter_calc(list(names), judged, scored):
        values[names[result.measure]][rows[result.query_id]] = result.value
    return values


def rank(run: Run) -> NDArray[np.intp]:
    """Return the columns of each query's pages, best first, in the order of trec_eval."""
    by_id = np.array(sorted(range(len(run.pages)), key=run.pages.__getitem__, reverse=True))
    order = np.argsort(-run.scores[:, by_id], axis=1, kind="stable")
    ranked: NDArray[np.intp] = by_id[order]
    return ranked


def overlap(first: Run, second: Run, depth: int) -> float:
    """Return the share of the first `depth` pages that two runs have in common, mean of queries."""
    depth = min(depth, len(first.pages))
    tops = zip(rank(first)[:, :depth], rank(second)[:, :depth], strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / depth for a, b in tops]))


def spearman(first: Run, second: Run) -> float:
    """Return Spearman's correlation of a query's page scores in two runs, mean of queries.

    Equal scores share their average rank. A query whose scores are all equal has no order: it
    counts 1 where that is so in both runs, else 0.
    """
    rows = zip(first.scores, second.scores, strict=True)
    return float(np.mean([_spearman(a, b) for a, b in rows]))


def pearson(first: Run, second: Run) -> float:
    """Return Pearson's correlation of all scores in two runs; 0 where one run has equal scores only."""
    a, b = (run.scores.astype(np.float64).ravel() for run in (first, second))
    a, b = a - a.mean(), b - b.mean()
    norms = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norms if norms > 0 else 0.0


def _spearman(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    a, b = (ranks - ranks.mean() for ranks in (_average_ranks(first), _average_ranks(second)))
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _average_ranks(values: NDArray[np.float32]) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def best_relevant(run: Run, relevance: Relevance) -> Floats:
    """Return the score of each query's best relevant page."""
    return _best(run, _relevant(run, relevance))


def margins(run: Run, relevance: Relevance) -> Floats:
    """Return, by query, the score of the best relevant page minus that of the best other page.

    Queries to which every page is relevant have no other page and are left out.
    """
    relevant = _relevant(run, relevance)
    kept: Floats = (_best(run, relevant) - _best(run, ~relevant))[~relevant.all(1)]
    return kept


def _best(run: Run, among: NDArray[np.bool_]) -> Floats:
    """Return each query's best score among some pages; -inf where there are none."""
    best: Floats = np.where(among, run.scores, -np.inf).max(1).astype(np.float64)
    return best


def _relevant(run: Run, relevance: Relevance) -> NDArray[np.bool_]:
    columns = {page: column for column, page in enumerate(run.pages)}
    relevant = np.zeros(run.scores.shape, dtype=np.bool_)
    for row, query in enumerate(run.queries):
        for page, score in relevance[query].items():
            relevant[row, columns[page]] = score > 0
    return relevant


def bootstrap_interval(differences: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean difference, resampling the queries.

    The paired bootstrap: each of 10,000 resamples draws as many queries as there are, with
    replacement, and takes the mean of their differences.
    """
    n = len(differences)
    draws = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    low, high = np.percentile(differences[draws].mean(1), (2.5, 97.5))
    return float(low), float(high)


def contrast(original: Floats, quantized: Floats) -> dict[str, float]:
    """Return both means over queries, quantized minus original, and its 95 % interval.

    All are 0 when there are no queries.
    """
    if len(original) == 0:
        keys = ("original", "quantized", "difference", "low", "high", "smallest_visible_loss")
        return dict.fromkeys(keys, 0.0)
    differences = quantized - original
    low, high = bootstrap_interval(differences)
    return {
        "original": float(original.mean()),
        "quantized": float(quantized.mean()),
        "difference": float(differences.mean()),
        "low": low,
        "high": high,
        "smallest_visible_loss": float(differences.mean()) - low,
    }


def compare(original: Run, quantized: Run, relevance: Relevance) -> dict[str, Any]:
    """Return every retrieval figure of two runs over the same queries and pages.

    `measure` and `margins` by `contrast`; ``top1_agreement``, ``top5_overlap``, ``spearman``,
    ``pearson``.
    """
    before, after = measure(original, relevance), measure(quantized, relevance)
    return {
        **{name: contrast(before[name], after[name]) for name in MEASURES},
        "margin": contrast(margins(original, relevance), margins(quantized, relevance)),
        "top1_agreement": overlap(original, quantized, 1),
        "top5_overlap": overlap(original, quantized, 5),
        "spearman": spearman(original, quantized),
        "pearson": pearson(original, quantized),
    }
