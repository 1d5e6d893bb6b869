"""MaxSim, the late interaction of ColBERT (Khattab and Zaharia, 2020, arXiv:2004.12832)."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

BATCH = 16  # queries and pages at a time: 35 MB of similarities for 26 and 1271 tokens


def max_sim(
    queries: Sequence[torch.Tensor] | torch.Tensor,
    pages: Sequence[torch.Tensor] | torch.Tensor,
    batch_size: int = BATCH,
) -> torch.Tensor:
    """Score every query against every page: sum over query tokens of the best page token.

    Rows of zeros are padding and are left out. The publisher's own method lets them take part, so
    that a query token whose best similarity is negative scores 0 on a padded page; here a score
    never depends on what else is in the batch.

    Parameters
    ----------
    queries, pages
        One [tokens, embed_dim] tensor each, or one padded tensor [items, tokens, embed_dim].
    batch_size
        Queries and pages that are scored at a time; it changes memory, no score.

    Returns
    -------
    torch.Tensor
        Float32 scores [queries, pages] on the CPU.

    Raises
    ------
    ValueError
        If there are no queries or no pages, they are not of one width, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, not a number above 0")
    if len(queries) == 0 or len(pages) == 0:
        raise ValueError("need at least one query and one page")
    if queries[0].shape[-1] != pages[0].shape[-1]:
        raise ValueError(
            f"vectors of queries have {queries[0].shape[-1]} numbers and those of pages "
            f"{pages[0].shape[-1]}: they are not of one model"
        )
    rows = []
    for q in range(0, len(queries), batch_size):
        query = pad_sequence(
            [item.float() for item in queries[q : q + batch_size]], batch_first=True
        )
        row = []
        for p in range(0, len(pages), batch_size):
            page = pad_sequence(
                [item.float() for item in pages[p : p + batch_size]], batch_first=True
            )
            page = page.to(query.device)
            padding = (page == 0).all(-1)
            similarities = torch.einsum("qnd,pmd->qpnm", query, page)
            best = similarities.masked_fill(padding[None, :, None, :], -torch.inf).amax(-1)
            # a padded query row must add 0, also on a page without any token
            best = best.masked_fill((query == 0).all(-1)[:, None, :], 0)
            row.append(best.sum(-1).cpu())
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)
