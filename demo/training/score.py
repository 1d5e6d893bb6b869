"""Late-interaction scores and ranking measures."""

import torch
from torch import Tensor

DEPTH = 5


def max_sim(queries: Tensor, mask: Tensor, pages: Tensor) -> Tensor:
    """Score queries against pages.

    Parameters
    ----------
    queries : Tensor
        Unit embeddings ``[queries, seq, dim]``.
    mask : Tensor
        ``[queries, seq]``, true on real tokens.
    pages : Tensor
        Unit embeddings ``[pages, tokens, dim]``, none of them padding.

    Returns
    -------
    Tensor
        ``[queries, pages]``: for each query token its best page token, summed over the query.
    """
    best = torch.einsum("qsd,ptd->qspt", queries, pages).amax(-1)
    return (best * mask[:, :, None]).sum(1)


def ndcg(scores: Tensor, relevant: Tensor) -> dict[str, float]:
    """Return nDCG@5, recall@1 and the nDCG@5 of a random order.

    Parameters
    ----------
    scores : Tensor
        ``[queries, pages]``, higher is better.
    relevant : Tensor
        ``[queries, pages]`` booleans, at least one true in each row.

    Returns
    -------
    dict
        ``ndcg_at_5``, ``recall_at_1`` (share of relevant pages found at the first place) and
        ``chance_ndcg_at_5``.
    """
    discount = 1 / torch.log2(torch.arange(DEPTH) + 2.0)
    count = relevant.sum(1)
    ideal = discount.cumsum(0)[count.clamp(max=DEPTH) - 1]
    order = scores.cpu().topk(min(DEPTH, scores.shape[1]), dim=1).indices
    relevance = relevant.cpu().gather(1, order).float()
    gain = (relevance * discount[: relevance.shape[1]]).sum(1) / ideal
    chance = count / relevant.shape[1] * discount[: relevance.shape[1]].sum() / ideal
    return {
        "ndcg_at_5": round(float(gain.mean()), 4),
        "recall_at_1": round(float((relevance[:, 0] / count).mean()), 4),
        "chance_ndcg_at_5": round(float(chance.mean()), 4),
    }
