"""Retrieval figures from MaxSim scores, of the original and the quantized model side by side.

Beside the scores themselves nothing grows with queries times pages: everything else is computed
for one query, or a bounded block of them, at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
import torch
from ir_measures import R, nDCG
from numpy.typing import NDArray
from scipy.stats import beta, spearmanr

from colqwen3.model.scoring import max_sim

Floats = NDArray[np.float64]
Scores = NDArray[np.float32]
Columns = NDArray[np.intp]
Relevance = Mapping[str, Mapping[str, int]]

MEASURES = {
    "ndcg_at_5": nDCG @ 5,
    "ndcg_at_10": nDCG @ 10,
    "recall_at_1": R @ 1,
    "recall_at_5": R @ 5,
}
RESAMPLES = 10_000
SEED = 0
BLOCK = 1 << 20
"""Draws of the bootstrap that are in memory at once."""
ENTRIES = 1 << 16
"""Scores that trec_eval is given at once."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Run:
    """Scores [queries, pages], float32 and finite, with the names of both axes."""

    queries: tuple[str, ...]
    pages: tuple[str, ...]
    scores: Scores


def finite(tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens with those that hold NaN or Inf as zero vectors."""
    return tokens.masked_fill(~tokens.isfinite().all(-1, keepdim=True), 0)


def finite_scores(queries: Sequence[torch.Tensor], pages: Sequence[torch.Tensor]) -> Scores:
    """Return the MaxSim [queries, pages] with tokens that hold NaN or Inf as zero vectors."""
    return search([finite(tokens) for tokens in queries], [finite(tokens) for tokens in pages])


def search(queries: Sequence[torch.Tensor], pages: Sequence[torch.Tensor]) -> Scores:
    """Return the MaxSim [queries, pages] of what `finite` returned."""
    # a page without one finite token: max_sim gives -inf, plain arithmetic on zero vectors 0
    scores: Scores = torch.nan_to_num(max_sim(queries, pages), nan=0.0, neginf=0.0).numpy()
    return scores


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
    names = {value: key for key, value in MEASURES.items()}
    values = {name: np.zeros(len(run.queries)) for name in MEASURES}
    step = max(1, ENTRIES // len(run.pages))
    for start in range(0, len(run.queries), step):
        block = {query: start + i for i, query in enumerate(run.queries[start : start + step])}
        judged = {query: dict(relevance[query]) for query in block}
        scored = {
            query: dict(zip(run.pages, run.scores[row].tolist(), strict=True))
            for query, row in block.items()
        }
        for result in ir_measures.pytrec_eval.iter_calc(list(names), judged, scored):
            values[names[result.measure]][block[result.query_id]] = result.value
    return values


def rank(run: Run, depth: int | None = None) -> Columns:
    """Return the columns of each query's first pages, best first, in the order of trec_eval.

    Parameters
    ----------
    run
        The scores.
    depth
        How many pages per query; all when None, and never more than there are.
    """
    by_id = _columns_by_id(run)
    depth = len(run.pages) if depth is None else min(depth, len(run.pages))
    ranked = np.empty((len(run.queries), depth), dtype=np.intp)
    for row, scores in enumerate(run.scores):
        ranked[row] = _order(scores, by_id)[:depth]
    return ranked


def _columns_by_id(run: Run) -> Columns:
    """Return the columns in the order in which trec_eval puts equal scores."""
    return np.array(sorted(range(len(run.pages)), key=run.pages.__getitem__, reverse=True))


def _order(scores: Scores, by_id: Columns) -> Columns:
    ranked: Columns = by_id[np.argsort(-scores[by_id], kind="stable")]
    return ranked


def first_pages(run: Run, relevance: Relevance) -> list[dict[str, Any]]:
    """Return for each query its first page, and its best relevant page with that page's rank.

    Returns
    -------
    list of dict
        ``first``, ``relevant`` (page ids) and ``rank`` (from 1), in the order of the queries.
    """
    by_id, relevant = _columns_by_id(run), _relevant(run, relevance)
    results = []
    for scores, columns in zip(run.scores, relevant, strict=True):
        order = _order(scores, by_id)
        place = int(np.flatnonzero(np.isin(order, columns))[0])
        results.append(
            {
                "first": run.pages[order[0]],
                "relevant": run.pages[order[place]],
                "rank": place + 1,
            }
        )
    return results


def overlap(first: Run, second: Run, depth: int) -> float:
    """Return the share of the first `depth` pages that two runs have in common, mean of queries."""
    tops = zip(rank(first, depth), rank(second, depth), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in tops]))


def spearman(first: Run, second: Run) -> float:
    """Return Spearman's correlation of a query's page scores in two runs, mean of queries.

    Equal scores share their average rank. A query whose scores are all equal has no order: it
    counts 1 where that is so in both runs, else 0.
    """
    rows = zip(first.scores, second.scores, strict=True)
    return float(np.mean([_spearman(a, b) for a, b in rows]))


def _spearman(first: Scores, second: Scores) -> float:
    flat = [bool((scores == scores[0]).all()) for scores in (first, second)]
    if any(flat):
        return float(all(flat))
    return float(spearmanr(first, second).statistic)


def pearson(first: Run, second: Run) -> float:
    """Return Pearson's correlation of all scores in two runs; 0 where one run has equal scores only."""
    means = [float(run.scores.mean(1, dtype=np.float64).mean()) for run in (first, second)]
    products = np.zeros((2, 2))
    for rows in zip(first.scores, second.scores, strict=True):
        centred = np.stack(
            [row.astype(np.float64) - mean for row, mean in zip(rows, means, strict=True)]
        )
        products += centred @ centred.T
    norms = math.sqrt(products[0, 0] * products[1, 1])
    return float(products[0, 1] / norms) if norms > 0 else 0.0


def best_relevant(run: Run, relevance: Relevance) -> Floats:
    """Return the score of each query's best relevant page."""
    rows = zip(run.scores, _relevant(run, relevance), strict=True)
    return np.array([scores[columns].max() for scores, columns in rows], dtype=np.float64)


def margins(run: Run, relevance: Relevance) -> Floats:
    """Return, by query, the score of the best relevant page minus that of the best other page.

    Queries to which every page is relevant have no other page and are left out.
    """
    differences = []
    for scores, columns in zip(run.scores, _relevant(run, relevance), strict=True):
        others = np.delete(scores, columns)
        if len(others):
            differences.append(float(scores[columns].max()) - float(others.max()))
    return np.array(differences, dtype=np.float64)


def _relevant(run: Run, relevance: Relevance) -> list[Columns]:
    """Return the columns of each query's relevant pages."""
    columns = {page: column for column, page in enumerate(run.pages)}
    return [
        np.array([columns[page] for page, score in relevance[query].items() if score > 0], np.intp)
        for query in run.queries
    ]


def bootstrap_interval(differences: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean difference, resampling the queries.

    The paired bootstrap (Efron and Tibshirani, 1993): each of 10,000 resamples draws as many
    queries as there are, with replacement, and takes the mean of their differences. Blocks of
    resamples come from one generator, so their size changes nothing.
    """
    n = len(differences)
    generator = np.random.default_rng(SEED)
    step = max(1, BLOCK // n)
    means = [
        differences[generator.integers(n, size=(min(step, RESAMPLES - start), n))].mean(1)
        for start in range(0, RESAMPLES, step)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def largest_share(count: int, queries: int) -> float:
    """Return the largest share of all possible queries that `count` of `queries` still allow.

    The exact one-sided 95 % bound of Clopper and Pearson (1934); with a count of 0 it is
    1 - 0.05 ** (1 / queries): 12 % for 24 queries, 1.2 % for 250.
    """
    if count >= queries:
        return 1.0
    return float(beta.ppf(CONFIDENCE, count + 1, queries - count))


def contrast(original: Floats, quantized: Floats, scale: float = 1.0) -> dict[str, float]:
    """Return both means over queries, quantized minus original, and its 95 % interval.

    Where all queries agree, resampling them gives an interval without width, which says more than
    so few queries can: then a share `largest_share` of all queries may still differ by `scale`,
    and that is the interval. All figures are 0 when there are no queries.

    Parameters
    ----------
    original, quantized
        One figure per query.
    scale
        What a single query can lose at most: 1 for a measure between 0 and 1.

    Returns
    -------
    dict
        ``original``, ``quantized``, ``difference``, ``low``, ``high``, and
        ``smallest_visible_loss``: a smaller one could have gone unseen, either because resampling
        varies by as much, or because it sits in queries that are too rare to be among these.
    """
    n = len(original)
    if n == 0:
        keys = ("original", "quantized", "difference", "low", "high", "smallest_visible_loss")
        return dict.fromkeys(keys, 0.0)
    differences = quantized - original
    difference = float(differences.mean())
    low, high = bootstrap_interval(differences)
    unseen = largest_share(0, n) * scale
    if low == high:
        low, high = difference - unseen, difference + unseen
    return {
        "original": float(original.mean()),
        "quantized": float(quantized.mean()),
        "difference": difference,
        "low": low,
        "high": high,
        "smallest_visible_loss": max(difference - low, unseen),
    }


def compare_first_pages(
    original: Sequence[Mapping[str, Any]], quantized: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return how many queries have another first page, or their best relevant page elsewhere.

    Parameters
    ----------
    original, quantized
        As `first_pages` gives them.

    Returns
    -------
    dict
        Numbers of queries ``changed``, ``ranked_lower`` and ``ranked_higher``; ``changed_share``,
        and ``changed_share_at_most``, the share that these queries still allow (`largest_share`).
    """
    pairs = list(zip(original, quantized, strict=True))
    changed = sum(before["first"] != after["first"] for before, after in pairs)
    return {
        "changed": changed,
        "changed_share": changed / len(pairs),
        "changed_share_at_most": largest_share(changed, len(pairs)),
        "ranked_lower": sum(after["rank"] > before["rank"] for before, after in pairs),
        "ranked_higher": sum(after["rank"] < before["rank"] for before, after in pairs),
    }


def compare(original: Run, quantized: Run, relevance: Relevance) -> dict[str, Any]:
    """Return every retrieval figure of two runs over the same queries and pages.

    `measure` and `margins` by `contrast`; `compare_first_pages` as ``first_pages``;
    ``top1_agreement``, ``top5_overlap``, ``spearman``, ``pearson``.
    """
    before, after = measure(original, relevance), measure(quantized, relevance)
    margin = margins(original, relevance)
    return {
        **{name: contrast(before[name], after[name]) for name in MEASURES},
        "margin": contrast(
            margin, margins(quantized, relevance), float(np.abs(margin).max(initial=0.0)) or 1.0
        ),
        "first_pages": compare_first_pages(
            first_pages(original, relevance), first_pages(quantized, relevance)
        ),
        "top1_agreement": overlap(original, quantized, 1),
        "top5_overlap": overlap(original, quantized, 5),
        "spearman": spearman(original, quantized),
        "pearson": pearson(original, quantized),
    }
