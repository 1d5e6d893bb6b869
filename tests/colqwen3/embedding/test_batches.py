"""Batches keep order and budget, and what is embedded in them equals single forwards."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from colqwen3.dataset.pages import find_pages, open_page
from colqwen3.embedding.batches import (
    AHEAD,
    count_visual_tokens,
    embed_all,
    page_batches,
    prepare_ahead,
    text_batches,
)
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import UserError

GOLDEN = Path("tests/golden")


def test_batches_keep_order_and_budget() -> None:
    processor = load_processor(GOLDEN / "model", 1280)
    sizes = {"a": (256, 256), "b": (256, 512), "c": (256, 256), "d": (512, 1024)}
    sizes |= {"e": (256, 256), "f": (256, 256)}  # after a large one, small ones go together again
    pages = [(name, Image.new("RGB", size)) for name, size in sizes.items()]
    tokens = {name: w * h // 1024 for name, (w, h) in sizes.items()}  # 32 x 32 pixels a token
    batches = [names for names, _ in page_batches(pages, processor, 300)]
    assert batches == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert [name for names in batches for name in names] == list(sizes)
    for names in batches:
        assert len(names) == 1 or len(names) * max(tokens[name] for name in names) <= 300


def test_pages_of_a_pdf_embed_as_images_of_them(tmp_path: Path) -> None:
    sheets = [Image.linear_gradient("L").rotate(90 * turn).convert("RGB") for turn in range(2)]
    (tmp_path / "pdf").mkdir()
    (tmp_path / "png").mkdir()
    sheets[0].save(tmp_path / "pdf/m.pdf", save_all=True, append_images=sheets[1:], resolution=100)
    sheets[0].save(tmp_path / "pdf/a.png")
    for name, page in find_pages(tmp_path / "pdf").items():
        open_page(page).save(tmp_path / f"png/{name}.png")
    processor = load_processor(GOLDEN / "model", 1280)
    model = load_model(GOLDEN / "model", torch.float32, torch.device("cpu"))
    from_pdf, from_png = (
        embed_all(model, processor, {}, find_pages(tmp_path / kind), 16, 1280)[1]
        for kind in ("pdf", "png")
    )
    assert list(from_pdf) == list(from_png) == ["a", "m-1", "m-2"]
    assert all(torch.equal(from_pdf[name], from_png[name]) for name in from_pdf)


def test_visual_tokens_are_counted_as_the_processor_makes_them() -> None:
    processor = load_processor(GOLDEN / "model", 1280)
    for path in sorted((GOLDEN / "inputs/pages").glob("*.png")):
        image = Image.open(path)
        result = processor.process_images([image])["image_grid_thw"].prod().item() // 4
        assert count_visual_tokens(path.stem, image, processor) == result
    with pytest.raises(UserError, match=r"page 'banner': .*aspect ratio"):
        count_visual_tokens("banner", Image.new("RGB", (4020, 20)), processor)
    for size in ((0, 0), (0, 9), (9, 0)):
        with pytest.raises(UserError, match=r"^page 'none': has no pixels; replace the page$"):
            count_visual_tokens("none", Image.new("RGB", size), processor)


class SlowFirst:
    """A processor that takes longest for what comes first, and counts what is under way."""

    def __init__(self) -> None:
        self.started = 0

    def process_images(self, images: list[int]) -> list[int]:
        self.started += 1
        time.sleep(0.2 / (1 + images[0]))
        return [-image for image in images]


def test_batches_prepared_ahead_keep_their_order_and_are_few() -> None:
    processor, taken = SlowFirst(), 0
    batches = (([f"p{i}"], [i]) for i in range(12))
    for number, (names, inputs) in enumerate(prepare_ahead(batches, processor)):  # type: ignore[arg-type]
        assert (names, inputs) == ([f"p{number}"], [-number])
        taken += 1
        assert processor.started <= taken + AHEAD
    assert taken == 12


def test_what_fails_ahead_fails_the_job() -> None:
    def batches() -> Iterator[tuple[list[str], list[Image.Image]]]:
        yield ["a"], [Image.new("RGB", (64, 64))]
        raise UserError("b.png: is empty")

    processor = load_processor(GOLDEN / "model", 1280)
    with pytest.raises(UserError, match=r"b\.png"):
        list(prepare_ahead(batches(), processor))


def test_a_long_text_goes_alone_and_keeps_its_place() -> None:
    texts = {"a": "x", "b": "x" * 5000, "c": "x", "d": "x", "e": "x", "f": "x" * 5000}
    assert list(text_batches(texts, 2)) == [["a"], ["b"], ["c", "d"], ["e"], ["f"]]
    assert list(text_batches({}, 2)) == []
