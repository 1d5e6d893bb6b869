import json

import pytest

from stages.evaluation.summary import loss_bars, ndcg_bars, rank_bars, summarize
from tests.helpers.metrics import GATE, SMALL


def test_each_figure_is_the_one_it_is_called() -> None:
    assert summarize(SMALL, GATE) == {
        "cos_page": 0.987654,
        "cos_query": 0.9,
        "higher": 1,
        "lower": 3,
        "mb": 1.25,
        "ndcg5": 0.5,
        "ndcg5_mixed": 0.625,
        "ndcg5_orig": 0.75,
        "recall1": 0.4,
        "top1_same": 0.33333,
        "verdict": "worse",  # 0.25 of nDCG@5 lost, 0.05 are allowed
    }


def test_a_row_is_flat_and_of_one_type_a_key() -> None:
    whole = json.loads(json.dumps(SMALL).replace("0.75", "1").replace("0.5", "0"))
    row = summarize(whole, GATE)
    assert {key: type(value) for key, value in row.items()} == {
        key: type(value) for key, value in summarize(SMALL, GATE).items()
    }


def test_missing_figures_are_no_zeros() -> None:
    with pytest.raises(KeyError):
        summarize({**SMALL, "mixed_index": {}}, GATE)


def test_bars_keep_the_order_of_recipes() -> None:
    bars = ndcg_bars({"b": summarize(SMALL, GATE), "a": summarize(SMALL, GATE)})
    assert [bar["bar"] for bar in bars] == [
        "b: original", "b: quantized", "b: mixed index",
        "a: original", "a: quantized", "a: mixed index",
    ]  # fmt: skip
    assert [bar["ndcg_at_5"] for bar in bars[:3]] == [0.75, 0.5, 0.625]


def test_losses_and_ranks_tell_recipes_apart() -> None:
    rows = {"b": summarize(SMALL, GATE)}
    assert [(bar["bar"], bar["loss"]) for bar in loss_bars(rows)] == [
        ("b: pages", 0.012346),
        ("b: queries", 0.1),
    ]
    assert [(bar["bar"], bar["queries"]) for bar in rank_bars(rows)] == [
        ("b: lower", 3),
        ("b: higher", 1),
    ]
