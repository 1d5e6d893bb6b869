import io

import numpy as np
import pytest
from PIL import Image, ImageFont

from colqwen3.search.maps import COLOURS, Map
from stages.evaluation.overlay import FULL, SMALL, Size, encode, picture, wrap

WHITE, RED = COLOURS[0], COLOURS[-1]
CAPTIONS = ("original", "recipe")


def spot(row: int, column: int, value: float = 1.0) -> Map:
    values = np.zeros((4, 3))
    values[row, column] = value
    return values


def count_red(maps: list[Map]) -> list[int]:
    """The red pixels in the left and right half of the picture, above its colour scale."""
    png = picture([Image.new("RGB", (300, 400), "white")] * 2, maps, CAPTIONS, "title")
    image = Image.open(io.BytesIO(png)).convert("RGB")
    above = np.asarray(image)[: image.height - 60]
    halves = np.array_split(above, 2, axis=1)
    return [int((half == RED).all(-1).sum()) for half in halves]


def test_both_pictures_have_one_scale() -> None:
    left, right = count_red([spot(1, 1), spot(1, 1, 0.5)])
    assert left > 1000
    assert right == 0
    left, right = count_red([spot(1, 1, 0.5), spot(1, 1)])
    assert left == 0
    assert right > 1000


@pytest.mark.parametrize("size", [FULL, SMALL])
def test_a_picture_is_small_even_of_noise_and_always_the_same(size: Size) -> None:
    noise = np.random.default_rng(0)
    page = Image.fromarray(noise.integers(0, 256, (1300, 1000, 3), dtype=np.uint8))
    maps = [noise.random((40, 31)), noise.random((40, 31))]
    png = picture([page, page], maps, CAPTIONS, "noise", size)
    assert len(png) <= size.bytes
    assert png == picture([page, page], maps, CAPTIONS, "noise", size)


def test_sixteen_greys_of_sixteen_colours_are_kept() -> None:
    image = Image.new("RGB", (2, 1), WHITE)
    image.putpixel((1, 0), RED)
    restored = Image.open(io.BytesIO(encode(image)))
    assert restored.mode == "P"
    assert [restored.convert("RGB").getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]


def test_pages_of_different_shapes_stand_side_by_side() -> None:
    pages = [Image.new("RGB", (300, 400), "white"), Image.new("RGB", (640, 320), "white")]
    wide = np.zeros((10, 20))
    wide[5, 10] = 1
    png = picture(pages, [spot(1, 1), wide], CAPTIONS, "two pages")
    image = Image.open(io.BytesIO(png)).convert("RGB")
    above = np.asarray(image)[: image.height - 60]
    rows, columns = np.nonzero((above == RED).all(-1))
    # a cell of the left page has a third of its width, one of the right a twentieth
    left = columns < image.width // 2
    assert np.ptp(columns[left]) > 4 * np.ptp(columns[~left]) > 0
    assert np.ptp(rows[left]) > 4 * np.ptp(rows[~left]) > 0


@pytest.mark.parametrize("size", [(1600, 8), (8, 1600), (1, 1)])
def test_odd_pages_can_be_drawn(size: tuple[int, int]) -> None:
    columns, rows = (max(1, side // 32) for side in size)
    values = np.random.default_rng(0).random((rows, columns))
    assert picture([Image.new("RGB", size)] * 2, [values, values], CAPTIONS, "odd\npage")


def test_titles_are_wrapped_and_cut_to_the_width() -> None:
    font = ImageFont.load_default(17)
    assert wrap("a short title", font, 300) == ["a short title"]
    for text in ("many words " * 500, "x" * 5000, "one " + "x" * 5000, "two\nlines " * 90):
        lines = wrap(text, font, 300)
        assert 1 <= len(lines) <= 2
        assert lines[-1].endswith(" ...")
        assert all(font.getlength(line) <= 300 for line in lines)
        assert "\n" not in "".join(lines)
