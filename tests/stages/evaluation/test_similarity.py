from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings
from colqwen3.model.loading import load_processor
from colqwen3.system.errors import UserError
from stages.evaluation.similarity import choose, score, similarity_map, visual_tokens
from tests.helpers.embeddings import by_loop, unit

MODEL = Path("demo/model").absolute()
BEFORE, AFTER = 4, 7  # tokens of the page prompt around the visual ones, as the publisher documents


def test_a_score_is_the_maxsim() -> None:
    query, page = unit(1, 3), unit(2, 9)
    assert score(query, page) == pytest.approx(by_loop(query, page), abs=1e-6)
    broken = page.clone()
    broken[0, 0] = float("nan")
    assert score(query, broken) == pytest.approx(by_loop(query, page[1:]), abs=1e-6)


def test_a_cell_is_the_mean_cosine_of_the_query_with_its_token() -> None:
    query, page = unit(1, 3), unit(2, 9)
    visual = np.array([False, True, True, True, False, True, True, True, False])
    values = similarity_map(query, page, visual, (3, 2))
    cells = [1, 2, 3, 5, 6, 7]  # row-major
    for number, token in enumerate(cells):
        expected = np.mean([np.dot(q, page[token].numpy()) for q in query.numpy()])
        assert values[number // 2, number % 2] == pytest.approx(expected, abs=1e-6)
    # MaxSim with a page of that one token, by query token
    assert values[1, 0] == pytest.approx(by_loop(query, page[3:4]) / 3, abs=1e-6)


def test_tokens_with_nan_count_as_zero() -> None:
    query, page = unit(1, 2), unit(2, 4)
    query[0, 0], page[3, 1] = float("nan"), float("inf")
    values = similarity_map(query, page, np.ones(4, dtype=np.bool_), (2, 2))
    assert values[0, 0] == pytest.approx(float(query[1] @ page[0]) / 2, abs=1e-6)
    assert values[1, 1] == 0


@pytest.mark.parametrize("tokens", [5, 7])
def test_another_number_of_tokens_is_refused(tokens: int) -> None:
    with pytest.raises(UserError, match=f"{tokens} embedded tokens, but 6 by the processor"):
        similarity_map(unit(1, 2), unit(2, tokens), np.ones(6, dtype=np.bool_), (3, 2))


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


@pytest.mark.parametrize(("size", "grid"), [((320, 640), (20, 10)), ((800, 320), (10, 25))])
def test_visual_tokens_lie_between_the_words_of_the_prompt(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    visual, actual = visual_tokens(load_processor(MODEL, 1280), Image.new("RGB", size, "white"))
    assert actual == grid
    count = grid[0] * grid[1]
    assert visual.tolist() == [False] * BEFORE + [True] * count + [False] * AFTER
