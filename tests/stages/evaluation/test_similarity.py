from pathlib import Path

import pytest

from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings
from stages.evaluation.similarity import choose, score
from tests.helpers.embeddings import by_loop, unit

MODEL = Path("demo/model").absolute()
BEFORE, AFTER = 4, 7  # tokens of the page prompt around the visual ones, as the publisher documents


def test_a_score_is_the_maxsim() -> None:
    query, page = unit(1, 3), unit(2, 9)
    assert score(query, page) == pytest.approx(by_loop(query, page), abs=1e-6)
    broken = page.clone()
    broken[0, 0] = float("nan")
    assert score(query, broken) == pytest.approx(by_loop(query, page[1:]), abs=1e-6)


def test_the_query_that_changed_most_is_chosen() -> None:
    pages = {"a": unit(10, 6), "b": unit(11, 4), "c": unit(12, 5)}
    queries = {f"q{number}": unit(20 + number, 3) for number in range(6)}
    changed = {name: unit(40 + number, 3) for number, name in enumerate(queries)}
    relevance = {
        name: {"a": 1, "b": number % 2, "c": 0} for number, name in enumerate(queries)
    }  # c answers nothing
    dataset = Dataset(dict.fromkeys(queries, "text"), {}, relevance)
    chosen = choose(dataset, Embeddings(queries, pages), Embeddings(changed, pages))
    moved = {}
    firsts = 0
    for name, judged in relevance.items():
        scores = {page: by_loop(queries[name], pages[page]) for page in judged if judged[page]}
        page = max(scores, key=scores.__getitem__)
        moved[name, page] = by_loop(changed[name], pages[page]) - scores[page]
        only = Dataset({name: "text"}, {}, {name: judged})
        assert choose(only, Embeddings(queries, pages), Embeddings(changed, pages)).page == page
        firsts += page == "a"
    assert 0 < firsts < len(queries)
    most = max(moved, key=lambda pair: abs(moved[pair]))
    assert (chosen.query, chosen.page) == most
    assert chosen.quantized - chosen.original == pytest.approx(moved[most], abs=1e-5)


def test_the_first_of_equal_changes_is_chosen() -> None:
    same = Embeddings({"q2": unit(1, 3), "q1": unit(2, 3)}, {"a": unit(3, 4)})
    dataset = Dataset({"q2": "x", "q1": "y"}, {}, {"q2": {"a": 1}, "q1": {"a": 1}})
    assert choose(dataset, same, same).query == "q2"
