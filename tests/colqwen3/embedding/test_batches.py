"""Batches keep order and budget, and pages of one size go together within their group."""

import random
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3.dataset.patches import Grid, PreparedPage
from colqwen3.embedding.batches import (
    like_size_batches,
    page_batches,
    prepare_image,
    text_batches,
)
from colqwen3.model.loading import load_processor
from colqwen3.system.errors import UserError

GOLDEN = Path("tests/golden")


def test_batches_keep_order_and_budget() -> None:
    tokens = {"a": 64, "b": 128, "c": 64, "d": 512, "e": 64, "f": 64}
    batches = [keys for keys, _ in page_batches(tokens.items(), int, 300)]
    # after a large one, small ones go together again
    assert batches == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    for names in batches:
        assert len(names) == 1 or len(names) * max(tokens[name] for name in names) <= 300


def area(grid: Grid) -> int:
    return grid[1] * grid[2]


def page(rows: int, columns: int = 1) -> PreparedPage:
    return PreparedPage(np.empty((0, 3), np.uint8), (1, rows, columns))


def test_pages_of_one_size_go_together() -> None:
    sizes = [4, 4, 6, 4, 6, 4, 4, 6]
    pages = [("g", number, page(size)) for number, size in enumerate(sizes)]
    batches = [[key for _, key in keys] for keys, _ in like_size_batches(pages, area, 13)]
    assert batches == [[0, 1, 3], [2, 4], [5, 6], [7]]


def test_like_size_batches_keep_the_budget_and_stay_within_their_group() -> None:
    generator = random.Random(1)
    pages = [
        (number // 50, number, page(generator.choice((2, 3, 5, 8, 40)), generator.choice((1, 2))))
        for number in range(220)
    ]
    batches = list(like_size_batches(pages, area, 30, held=10))
    seen: list[int] = []
    for keys, batch in batches:
        assert len({group for group, _ in keys}) == 1
        longest = max(area(page.grid) for page in batch)
        assert len(batch) == 1 or len(batch) * longest <= 30
        for (_, number), item in zip(keys, batch, strict=True):
            assert item is pages[number][2]
            seen.append(number)
    assert sorted(seen) == list(range(220))
    order = [group for group, _ in groupby(keys[0][0] for keys, _ in batches)]
    assert order == sorted(order)  # groups one after the other
    # what a group's batches are depends on that group alone
    alone = like_size_batches([item for item in pages if item[0] == 2], area, 30, held=10)
    assert [keys for keys, _ in alone] == [keys for keys, _ in batches if keys[0][0] == 2]


def test_few_pages_are_held() -> None:
    taken = 0

    def pages() -> Iterator[tuple[int, int, PreparedPage]]:
        nonlocal taken
        for number in range(100):  # no two of one size
            taken += 1
            yield 0, number, page(number + 1)

    done = 0
    for keys, _ in like_size_batches(pages(), area, 10**9, held=7):
        done += len(keys)
        assert taken - done <= 7
    assert done == 100


def test_an_image_without_pixels_or_too_long_is_rejected_by_name() -> None:
    processor = load_processor(GOLDEN / "model", 1280)
    with pytest.raises(UserError, match=r"page 'banner': .*aspect ratio"):
        prepare_image("banner", Image.new("RGB", (4020, 20)), processor)
    for size in ((0, 0), (0, 9), (9, 0)):
        with pytest.raises(UserError, match=r"^page 'none': has no pixels; replace the page$"):
            prepare_image("none", Image.new("RGB", size), processor)


def test_a_long_text_goes_alone_and_keeps_its_place() -> None:
    texts = {"a": "x", "b": "x" * 5000, "c": "x", "d": "x", "e": "x", "f": "x" * 5000}
    assert list(text_batches(texts, 2)) == [["a"], ["b"], ["c", "d"], ["e"], ["f"]]
    assert list(text_batches({}, 2)) == []
