import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from stages.evaluation import retrieval
from stages.evaluation.retrieval import Run


def make_run(scores: dict[str, dict[str, float]]) -> Run:
    queries, pages = tuple(scores), tuple(next(iter(scores.values())))
    rows = [[scores[query][page] for page in pages] for query in queries]
    return Run(queries, pages, np.array(rows, dtype=np.float32))


# By hand. q1 ranks d, b, a, c, ...: a and b tie, and trec_eval puts the greater id first.
# nDCG@5 = (1/log2(4) + 2/log2(5)) / (2/log2(2) + 1/log2(3)) = 1.361353 / 2.630930 = 0.517442;
# with a before b it would be 0.567207. q2's only relevant page is 7th: nDCG@10 = 1/log2(8).
BY_HAND = make_run(
    {
        "q1": {"a": 2, "b": 2, "c": 1, "d": 3, "e": 0.5, "f": 0.4, "g": 0.3},
        "q2": {"a": 9, "b": 8, "c": 7, "d": 6, "e": 5, "f": 4, "g": 3},
    }
)
JUDGED = {"q1": {"a": 1, "c": 2, "d": 0}, "q2": {"g": 1}}


def test_measures_equal_a_case_with_ties_computed_by_hand() -> None:
    measured = {name: list(values) for name, values in retrieval.measure(BY_HAND, JUDGED).items()}
    assert measured == {
        "ndcg_at_5": pytest.approx([0.517442, 0], abs=1e-6),
        "ndcg_at_10": pytest.approx([0.517442, 1 / 3], abs=1e-6),
        "recall_at_1": [0, 0],
        "recall_at_5": [1, 0],
    }


def test_recall_is_a_share_of_the_relevant_pages() -> None:
    judged = {"q1": {"d": 1, "b": 1, "g": 3}, "q2": {"a": 1}}
    measured = retrieval.measure(BY_HAND, judged)
    assert measured["recall_at_1"] == pytest.approx([1 / 3, 1])
    assert measured["recall_at_5"] == pytest.approx([2 / 3, 1])


def random_run(seed: int, levels: int = 4, pages: int = 23, queries: int = 17) -> Run:
    drawn = np.random.default_rng(seed)
    names = [f"{'zäa€A'[i % 5]}{i}" for i in range(pages)]
    scores = (drawn.integers(0, levels, (queries, pages)) / 3).astype(np.float32)
    return Run(tuple(f"q{i}" for i in range(queries)), tuple(names), scores)


def random_relevance(run: Run, seed: int) -> dict[str, dict[str, int]]:
    drawn = np.random.default_rng(seed)
    relevance: dict[str, dict[str, int]] = defaultdict(dict)
    for query in run.queries:
        for page in drawn.choice(run.pages, 4, replace=False):
            relevance[query][str(page)] = int(drawn.integers(0, 4))
        relevance[query][str(page)] = 2
    return dict(relevance)


def ranked_by_loop(run: Run, row: int) -> list[str]:
    pairs = sorted(zip(run.scores[row].tolist(), run.pages, strict=True), reverse=True)
    return [page for _, page in pairs]


def test_measures_equal_plain_formulas_on_runs_full_of_ties() -> None:
    run = random_run(1)
    relevance = random_relevance(run, 2)
    measured = retrieval.measure(run, relevance)
    for row, query in enumerate(run.queries):
        gains = [relevance[query].get(page, 0) for page in ranked_by_loop(run, row)]
        ideal = sorted(relevance[query].values(), reverse=True)
        for depth in (5, 10):
            dcg, best = (
                sum(gain / math.log2(rank + 2) for rank, gain in enumerate(values[:depth]))
                for values in (gains, ideal)
            )
            assert measured[f"ndcg_at_{depth}"][row] == pytest.approx(dcg / best, abs=1e-12)
        relevant = sum(gain > 0 for gain in gains)
        for depth in (1, 5):
            recall = sum(gain > 0 for gain in gains[:depth]) / relevant
            assert measured[f"recall_at_{depth}"][row] == pytest.approx(recall, abs=1e-12)


def test_the_order_of_pages_and_queries_changes_nothing() -> None:
    run = random_run(3)
    relevance = random_relevance(run, 4)
    rows, columns = (
        np.random.default_rng(5).permutation(17),
        np.random.default_rng(6).permutation(23),
    )
    moved = Run(
        tuple(run.queries[row] for row in rows),
        tuple(run.pages[column] for column in columns),
        run.scores[np.ix_(rows, columns)],
    )
    before, after = retrieval.measure(run, relevance), retrieval.measure(moved, relevance)
    for name, values in before.items():
        assert after[name].tolist() == values[rows].tolist()
    assert (
        retrieval.margins(moved, relevance).tolist()
        == retrieval.margins(run, relevance)[rows].tolist()
    )


def test_neighbouring_float32_scores_are_no_tie() -> None:
    above = float(np.nextafter(np.float32(20), np.float32(21)))
    run = make_run({"q": {"a": above, "b": 20.0}})
    assert retrieval.measure(run, {"q": {"a": 1}})["recall_at_1"] == [1]
    assert retrieval.rank(run).tolist() == [[0, 1]]


def test_ranks_in_the_order_of_trec_eval() -> None:
    run = random_run(7)
    for row, columns in enumerate(retrieval.rank(run)):
        assert [run.pages[column] for column in columns] == ranked_by_loop(run, row)


def test_a_query_without_judgements_is_an_error() -> None:
    with pytest.raises(KeyError):
        retrieval.measure(BY_HAND, {"q1": {"a": 1}})


def test_overlap_by_hand() -> None:
    first = make_run(
        {
            "q1": {"a": 6, "b": 5, "c": 4, "d": 3, "e": 2, "f": 1},
            "q2": {"a": 6, "b": 5, "c": 4, "d": 3, "e": 2, "f": 1},
        }
    )
    second = make_run(
        {
            "q1": {"a": 6, "b": 1, "c": 4, "d": 3, "e": 2, "f": 5},  # top 5 loses b, gains f
            "q2": {"a": 5, "b": 6, "c": 4, "d": 3, "e": 2, "f": 1},  # only the first two change
        }
    )
    assert retrieval.overlap(first, second, 1) == 0.5
    assert retrieval.overlap(first, second, 5) == pytest.approx((4 / 5 + 1) / 2)
    assert retrieval.overlap(first, second, 99) == 1  # as deep as there are pages


def test_spearman_equals_the_correlation_of_average_ranks() -> None:
    first, second = random_run(8), random_run(9, levels=6)

    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values)
            + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    rows = zip(first.scores.tolist(), second.scores.tolist(), strict=True)
    expected = np.mean([np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in rows])
    assert retrieval.spearman(first, second) == pytest.approx(expected, abs=1e-12)
    assert retrieval.spearman(first, first) == pytest.approx(1)


def test_pearson_is_over_all_scores_together() -> None:
    def run_of(scores: Any) -> Run:
        return Run(("a", "b"), ("x", "y", "z"), np.array(scores, dtype=np.float32))

    first, second = run_of([[1, 2, 3], [7, 5, 9]]), run_of([[2, 1, 4], [6, 5, 9]])
    expected = np.corrcoef(first.scores.ravel(), second.scores.ravel())[0, 1]
    assert retrieval.pearson(first, second) == pytest.approx(expected, abs=1e-12)
    assert retrieval.pearson(first, run_of(-3 * first.scores + 1)) == pytest.approx(-1)
    flat = run_of(np.ones((2, 3)))
    assert retrieval.pearson(first, flat) == retrieval.pearson(flat, flat) == 0


def test_spearman_of_scores_that_are_all_equal() -> None:
    flat, steep = make_run({"q": {"a": 1, "b": 1}}), make_run({"q": {"a": 1, "b": 2}})
    falling = make_run({"q": {"a": 2, "b": 1}})
    assert retrieval.spearman(flat, flat) == 1
    assert retrieval.spearman(flat, steep) == retrieval.spearman(steep, flat) == 0
    assert retrieval.spearman(steep, falling) == pytest.approx(-1, abs=1e-12)


def test_margins_by_hand() -> None:
    run = make_run(
        {
            "found": {"a": 5, "b": 3, "c": 4.5},
            "missed": {"a": 1, "b": 3, "c": 2},
            "all relevant": {"a": 1, "b": 3, "c": 2},
        }
    )
    judged = {
        "found": {"a": 1, "b": 2, "c": 0},  # 5 against c, which is judged but not relevant
        "missed": {"c": 1},  # 2 against 3
        "all relevant": {"a": 1, "b": 1, "c": 1},
    }
    assert retrieval.margins(run, judged).tolist() == [0.5, -1]
    assert retrieval.best_relevant(run, judged).tolist() == [5, 2, 3]


def test_the_interval_equals_a_loop_over_resamples() -> None:
    differences = np.random.default_rng(10).normal(-0.1, 0.3, 40)
    draws = np.random.default_rng(0).integers(40, size=(10_000, 40))
    means = sorted(sum(differences[i] for i in draw) / 40 for draw in draws.tolist())
    # percentile p lies at position p * (n - 1) of the sorted values: 249.975 and 9749.025
    low = means[249] + 0.975 * (means[250] - means[249])
    high = means[9749] + 0.025 * (means[9750] - means[9749])
    assert retrieval.bootstrap_interval(differences) == pytest.approx((low, high), abs=1e-12)
    # and it is what theory says of a mean, nearly
    spread = 1.96 * differences.std() / math.sqrt(40)
    centre = differences.mean()
    assert (low, high) == pytest.approx((centre - spread, centre + spread), abs=0.01)


def test_contrast_is_paired() -> None:
    # the queries differ widely, their differences not at all
    original = np.linspace(0, 1, 20)
    figures = retrieval.contrast(original, original - 0.25)
    assert figures == {
        "original": pytest.approx(0.5),
        "quantized": pytest.approx(0.25),
        "difference": pytest.approx(-0.25),
        # all lose the same, but 20 queries cannot speak for 14 % of all: 1 - 0.05 ** (1 / 20)
        "low": pytest.approx(-0.25 - 0.139108, abs=1e-6),
        "high": pytest.approx(-0.25 + 0.139108, abs=1e-6),
        "smallest_visible_loss": pytest.approx(0.139108, abs=1e-6),
    }
    # unpaired, the interval would be as wide as the queries are different
    noisy = retrieval.contrast(original, original - 0.25 + np.tile([0.001, -0.001], 10))
    assert noisy["high"] - noisy["low"] < 0.002


def test_contrast_of_nothing_is_finite() -> None:
    assert set(retrieval.contrast(np.zeros(0), np.zeros(0)).values()) == {0.0}


def test_compare_puts_each_figure_under_its_name() -> None:
    worse = Run(BY_HAND.queries, BY_HAND.pages, BY_HAND.scores[:, ::-1].copy())
    figures = retrieval.compare(BY_HAND, worse, JUDGED)
    assert set(figures) == {
        *("ndcg_at_5", "ndcg_at_10", "recall_at_1", "recall_at_5", "margin"),
        *("first_pages", "top1_agreement", "top5_overlap", "spearman", "pearson"),
    }
    # q1 keeps d; its best relevant page was a, 3rd, and is c, 5th. q2's g rises from 7th to 1st
    first = figures["first_pages"]
    assert (first["changed"], first["changed_share"]) == (1, 0.5)
    assert (first["ranked_lower"], first["ranked_higher"]) == (1, 1)
    for name, values in retrieval.measure(worse, JUDGED).items():
        assert figures[name]["quantized"] == pytest.approx(values.mean())
    assert figures["ndcg_at_10"]["original"] == pytest.approx((0.517442 + 1 / 3) / 2, abs=1e-6)
    # original: a 2 and c 1 against d 3; g 3 against a 9. Reversed: e.g. q1's c has 0.5, a 0.3
    assert figures["margin"]["original"] == pytest.approx((2 - 3 + 3 - 9) / 2)
    assert figures["margin"]["quantized"] == pytest.approx((0.5 - 3 + 9 - 8) / 2)
    # q1 has d, c and e in both top fives, q2 has c, d and e
    assert (figures["top1_agreement"], figures["top5_overlap"]) == (0.5, pytest.approx(0.6))


@pytest.mark.parametrize(("count", "queries"), [(0, 24), (0, 252), (3, 40), (39, 40)])
def test_the_largest_share_is_that_of_the_exact_binomial_bound(count: int, queries: int) -> None:
    share = retrieval.largest_share(count, queries)
    chance = sum(
        math.comb(queries, k) * share**k * (1 - share) ** (queries - k) for k in range(count + 1)
    )
    assert chance == pytest.approx(0.05, abs=1e-9)


def test_nothing_changed_among_24_queries_still_allows_12_percent() -> None:
    assert retrieval.largest_share(0, 24) == pytest.approx(1 - 0.05 ** (1 / 24))
    assert retrieval.largest_share(0, 24) == pytest.approx(0.117, abs=5e-4)
    assert retrieval.largest_share(24, 24) == 1


def test_no_interval_is_without_width() -> None:
    ones = np.ones(24)
    figures = retrieval.contrast(ones, ones)
    assert figures["low"] < 0 < figures["high"]
    assert figures["smallest_visible_loss"] == pytest.approx(0.117, abs=5e-4)


def test_rare_losses_bound_what_could_have_been_seen() -> None:
    original = np.ones(250)
    quantized = original.copy()
    quantized[0] = 0.99  # resampling alone would claim to see a loss of 0.0001
    figures = retrieval.contrast(original, quantized)
    assert figures["low"] > -0.001
    assert figures["smallest_visible_loss"] == pytest.approx(1 - 0.05 ** (1 / 250))


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(11).normal(size=33)
    whole = retrieval.bootstrap_interval(differences)
    for block in (1, 7 * 33, 999):
        monkeypatch.setattr(retrieval, "BLOCK", block)
        assert retrieval.bootstrap_interval(differences) == whole


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = random_run(12)
    relevance = random_relevance(run, 13)
    whole = retrieval.measure(run, relevance)
    monkeypatch.setattr(retrieval, "ENTRIES", 60)  # two queries of 23 pages
    for name, values in retrieval.measure(run, relevance).items():
        assert values.tolist() == whole[name].tolist()


def test_first_pages_and_ranks_equal_a_loop() -> None:
    run = random_run(14)
    relevance = random_relevance(run, 15)
    results = retrieval.first_pages(run, relevance)
    for row, (query, result) in enumerate(zip(run.queries, results, strict=True)):
        ranked = ranked_by_loop(run, row)
        places = [ranked.index(page) for page, score in relevance[query].items() if score > 0]
        assert result == {
            "first": ranked[0],
            "relevant": ranked[min(places)],
            "rank": min(places) + 1,
        }


def test_changes_of_first_pages_and_ranks_are_counted() -> None:
    before = [{"first": "a", "rank": 1}, {"first": "b", "rank": 3}, {"first": "c", "rank": 2}]
    after = [{"first": "a", "rank": 1}, {"first": "a", "rank": 2}, {"first": "c", "rank": 9}]
    assert retrieval.compare_first_pages(before, after) == {
        "changed": 1,
        "changed_share": pytest.approx(1 / 3),
        "changed_share_at_most": retrieval.largest_share(1, 3),
        "ranked_lower": 1,
        "ranked_higher": 1,
    }
