"""Maps of where a query matches: by hand, and drawn where they say."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3.model.loading import load_processor
from colqwen3.search.maps import COLOURS, Map, colour, overlay, similarity_map, visual_tokens
from colqwen3.system.errors import UserError
from tests.helpers.embeddings import by_loop, unit

MODEL = Path("demo/model").absolute()
BEFORE, AFTER = 4, 7  # tokens of the page prompt around the visual ones, as the publisher documents
WHITE, RED = COLOURS[0], COLOURS[-1]


def spot(row: int, column: int, value: float = 1.0) -> Map:
    values = np.zeros((4, 3))
    values[row, column] = value
    return values


def centre(panel: Image.Image, row: int, column: int) -> tuple[int, ...]:
    pixel = panel.getpixel(
        (round((column + 0.5) * panel.width / 3), round((row + 0.5) * panel.height / 4))
    )
    assert isinstance(pixel, tuple)
    return pixel


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


@pytest.mark.parametrize(("size", "grid"), [((320, 640), (20, 10)), ((800, 320), (10, 25))])
def test_visual_tokens_lie_between_the_words_of_the_prompt(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    visual, actual = visual_tokens(load_processor(MODEL, 1280), Image.new("RGB", size, "white"))
    assert actual == grid
    count = grid[0] * grid[1]
    assert visual.tolist() == [False] * BEFORE + [True] * count + [False] * AFTER


def test_colours_run_from_white_at_low_or_less_to_red_at_high() -> None:
    row = colour(np.array([[-9.0, 0.0, 0.5, 1.0]]), 0, 1)
    assert [row.getpixel((x, 0)) for x in (0, 1, 3)] == [WHITE, WHITE, RED]
    ladder = np.asarray(colour(np.linspace(0, 1, 50)[None], 0, 1)).astype(int).sum(-1)[0]
    assert (np.diff(ladder) <= 0).all()
    assert len(set(ladder.tolist())) == 16


def test_equal_values_are_white() -> None:
    assert colour(np.full((1, 1), 0.3), 0.3, 0.3).getpixel((0, 0)) == WHITE


def test_cells_lie_where_the_map_says() -> None:
    panel = overlay(Image.new("RGB", (300, 400), "white"), spot(2, 1), 0, 1, 400)
    assert panel.size == (300, 400)
    assert centre(panel, 2, 1) == RED
    assert {centre(panel, row, column) for row, column in ((1, 2), (2, 0), (0, 1))} == {WHITE}


def test_print_stays_darker_than_its_cell_and_dark_pages_turn_light() -> None:
    page = Image.new("L", (300, 400), 255)
    page.paste(0, (100, 0, 200, 100))
    panel = overlay(page, spot(0, 1), 0, 1, 400)
    assert max(centre(panel, 0, 1)) < max(RED) / 3
    dark = overlay(Image.new("L", (300, 400), 5), spot(0, 1), 0, 1, 400)
    assert min(centre(dark, 3, 2)) > 240
    assert centre(dark, 0, 1)[0] > 200
