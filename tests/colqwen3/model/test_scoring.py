import math

import pytest
import torch

from colqwen3.model import scoring
from colqwen3.model.scoring import max_sim


def unit(tokens: int, seed: int, dim: int = 8) -> torch.Tensor:
    drawn = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


QUERIES = [unit(tokens, seed) for seed, tokens in enumerate((3, 1, 5, 2))]
PAGES = [unit(tokens, 100 + seed) for seed, tokens in enumerate((4, 9, 1, 6, 2))]


def by_loop(query: torch.Tensor, page: torch.Tensor) -> float:
    total = 0.0
    for q in query.tolist():
        best = -math.inf
        for p in page.tolist():
            best = max(best, sum(x * y for x, y in zip(q, p, strict=True)))
        total += best
    return total


def expected() -> torch.Tensor:
    return torch.tensor([[by_loop(query, page) for page in PAGES] for query in QUERIES])


def padded(items: list[torch.Tensor]) -> torch.Tensor:
    longest = max(len(item) for item in items) + 2
    rows = [torch.cat([torch.zeros(longest - len(item), 8), item]) for item in items]
    return torch.stack(rows)


def test_is_the_sum_of_the_best_similarities() -> None:
    scores = max_sim(QUERIES, PAGES)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_scores_do_not_depend_on_the_size_of_a_batch(batch_size: int) -> None:
    scores = max_sim(QUERIES, PAGES, batch_size)
    torch.testing.assert_close(scores, expected(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_an_error(batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size is"):
        max_sim(QUERIES, PAGES, batch_size)


def test_vectors_of_different_models_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"queries have 3 numbers and those of pages 4: .*model"):
        max_sim([torch.ones(2, 3)], [torch.ones(5, 4)])


def test_zero_rows_change_nothing() -> None:
    scores = max_sim(padded(QUERIES), padded(PAGES))
    torch.testing.assert_close(scores, expected(), atol=1e-6, rtol=0)


def test_a_negative_best_similarity_counts_on_a_padded_page() -> None:
    query, away, long = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.6, 0.8]]), torch.ones(3, 2)
    assert max_sim([query], [away, long])[0].tolist() == pytest.approx([-0.6, 1.0])


def test_a_score_does_not_depend_on_the_rest_of_the_batch() -> None:
    together = max_sim(QUERIES, PAGES)
    alone = torch.cat([max_sim([query], [PAGES[1]]) for query in QUERIES])
    torch.testing.assert_close(together[:, 1:2], alone, atol=1e-6, rtol=0)


def test_an_item_of_padding_alone() -> None:
    empty = torch.zeros(2, 8)
    assert max_sim([empty, QUERIES[0]], [empty])[:, 0].tolist() == [0, -math.inf]
    assert max_sim([empty], PAGES).tolist() == [[0] * len(PAGES)]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batches_cover_every_query_and_page(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(scoring, "BATCH", batch)
    torch.testing.assert_close(max_sim(QUERIES, PAGES), expected(), atol=1e-6, rtol=0)


def test_scores_bfloat16_in_float32() -> None:
    queries = [query.bfloat16() for query in QUERIES]
    scores = max_sim(queries, PAGES)
    reference = torch.tensor([[by_loop(q.float(), page) for page in PAGES] for q in queries])
    torch.testing.assert_close(scores, reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("queries", "pages"), [([], PAGES), (QUERIES, [])])
def test_refuses_an_empty_side(queries: list[torch.Tensor], pages: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="at least one query and one page"):
        max_sim(queries, pages)
