"""The processor against the documented prompt, token counts and golden token ids."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from colqwen3.dataset.pages import Page, open_page
from colqwen3.model import ColQwen3Processor
from tests.helpers.odd_pages import PAGES as ODD_PAGES
from tests.helpers.odd_pages import expected_page, write_page

GOLDEN = Path("tests/golden")
META = json.loads((GOLDEN / "golden_meta.json").read_text())
QUERIES: dict[str, str] = json.loads((GOLDEN / "inputs/queries.json").read_text())


@pytest.fixture(scope="module")
def processor() -> ColQwen3Processor:
    return ColQwen3Processor.from_pretrained(str(GOLDEN / "model"))


def runs(ids: torch.Tensor) -> list[list[int]]:
    return [[key, len(list(group))] for key, group in itertools.groupby(ids.tolist())]


def test_token_ids_equal_golden(processor: ColQwen3Processor) -> None:
    for name, text in QUERIES.items():
        ids = processor.process_texts([text])["input_ids"][0]
        assert runs(ids) == META["queries"][name]["input_ids_runs"]
    for path in sorted((GOLDEN / "inputs/pages").glob("*.png")):
        inputs = processor.process_images([Image.open(path)])
        assert runs(inputs["input_ids"][0]) == META["pages"][path.stem]["input_ids_runs"]


def test_query_is_stripped_and_ends_in_ten_attended_augmentation_tokens(
    processor: ColQwen3Processor,
) -> None:
    inputs = processor.process_texts(["  total of the year \n"])
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    words = processor.tokenizer("total of the year")["input_ids"]
    assert inputs["input_ids"][0].tolist() == words + [end] * 10
    assert inputs["attention_mask"].all()


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|endoftext|>", "<|vision_start|>"])
def test_a_special_token_in_a_text_is_text(processor: ColQwen3Processor, token: str) -> None:
    special = processor.tokenizer.convert_tokens_to_ids(token)
    inputs = processor.process_texts([f"total {token} of {token}", token])
    texts = inputs["input_ids"][:, :-10]
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    padding = inputs["attention_mask"][:, :-10] == 0
    assert not (texts[~padding] == special).any()
    assert (inputs["input_ids"][:, -10:] == end).all()
    # nothing is lost: the text can be read back
    assert processor.tokenizer.decode(texts[0]) == f"total {token} of {token}"
    # and a page that comes after it has its tokens all the same
    page = processor.process_images([Image.new("RGB", (64, 64))])["input_ids"]
    assert (page == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).any()


@pytest.mark.parametrize(
    ("size", "visual"),
    [
        ((320, 640), 10 * 20),
        ((61, 43), 70),  # grown to the minimum number of pixels
        ((1240, 1754), 1260),  # an A4 page at 150 dpi, shrunk to the cap: 30 x 42 tokens
    ],
)
def test_page_has_its_visual_tokens_and_eleven_more(
    processor: ColQwen3Processor, size: tuple[int, int], visual: int
) -> None:
    inputs = processor.process_images([Image.new("RGB", size, "white")])
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = inputs["input_ids"][0]
    assert int((ids == image).sum()) == visual
    assert len(ids) == visual + 11
    grid = inputs["image_grid_thw"][0]
    assert grid.prod() == 4 * visual == len(inputs["pixel_values"])
    text = processor.tokenizer.decode(ids).replace("<|image_pad|>" * visual, "*")
    assert text == (
        "<|im_start|>user\n<|vision_start|>*<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
    )


@pytest.mark.parametrize("cap", [4, 100, 1280])
def test_visual_tokens_stay_under_the_cap(cap: int) -> None:
    processor = ColQwen3Processor.from_pretrained(str(GOLDEN / "model"), max_num_visual_tokens=cap)
    grid = processor.process_images([Image.new("RGB", (1700, 2200))])["image_grid_thw"][0]
    assert grid.prod() // 4 <= cap


def test_pixels_are_scaled_to_minus_one_to_one(processor: ColQwen3Processor) -> None:
    for colour, value in (("black", -1.0), ("white", 1.0), ("red", None)):
        pixels = processor.process_images([Image.new("RGB", (320, 320), colour)])["pixel_values"]
        if value is not None:
            assert torch.allclose(pixels, torch.full_like(pixels, value))
        else:  # channels first within a patch: all of red, then green, then blue
            channels = pixels.reshape(len(pixels), 3, -1)
            assert channels[:, 0].eq(1).all()
            assert channels[:, 1:].eq(-1).all()


@pytest.mark.parametrize(
    "size", [(1240, 1754), (61, 43), (33, 5000), (1600, 96), (850, 1100), (672, 896)]
)
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("colours", [1, 2, 3])
def test_pixels_are_those_of_the_image_processor_to_the_last_bit(
    size: tuple[int, int], normalized: bool, colours: int
) -> None:
    processor = ColQwen3Processor.from_pretrained(str(GOLDEN / "model"))
    images = processor.image_processor
    if normalized:  # differently for each channel, so that a mistaken channel shows
        images.image_mean, images.image_std = [0.5, 0.4, 0.3], [0.5, 0.25, 0.7]
    else:
        images.do_rescale = images.do_normalize = False
    noise = [Image.effect_noise(size, 90) for _ in range(3)]
    if colours == 2:  # a single pixel has a colour
        noise[1] = noise[2] = noise[0].copy()
        for column, level in enumerate((0, 255)):  # at least one of the two changes
            noise[2].paste(level, (column, 0, column + 1, 1))
    page = Image.merge("RGB", noise[:1] * 3 if colours == 1 else noise)
    expected = images([page, page], return_tensors="pt")
    actual = processor.process_images([page, page])
    for key in ("pixel_values", "image_grid_thw"):
        assert actual[key].dtype == expected[key].dtype
        assert torch.equal(actual[key], expected[key])


def test_pages_as_bytes_become_the_same_pixels(processor: ColQwen3Processor) -> None:
    pages = [Image.effect_noise(size, 90).convert("RGB") for size in ((64, 96), (128, 64))]
    cut, whole = processor.cut_pages(pages), processor.process_images(pages)
    assert cut.keys() == (whole.keys() - {"pixel_values"}) | {"patches"}
    assert all(torch.equal(cut[key], whole[key]) for key in whole.keys() - {"pixel_values"})
    each = [processor.cut_page(page)[0] for page in pages]
    assert cut["patches"].tolist() == [*each[0].tolist(), *each[1].tolist()]
    # 8 bits of one of two equal frames, for two of 32
    assert 8 * cut["patches"].nbytes == whole["pixel_values"].nbytes
    assert torch.equal(processor.pixel_values(cut["patches"]), whole["pixel_values"])
    with pytest.raises(ValueError, match="page 2 of 2 is 0 x 9 pixels"):
        processor.cut_pages([pages[0], Image.new("RGB", (0, 9))])


def test_pixels_of_a_page_that_is_not_resized(processor: ColQwen3Processor) -> None:
    unresized = ColQwen3Processor.from_pretrained(str(GOLDEN / "model"))
    unresized.image_processor.do_resize = False
    page = Image.effect_noise((64, 96), 90).convert("RGB")
    expected = unresized.image_processor([page], return_tensors="pt")
    actual = unresized.process_images([page])
    assert actual["image_grid_thw"].tolist() == [[1, 6, 4]]
    assert torch.equal(actual["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_image_modes_become_rgb(processor: ColQwen3Processor, mode: str) -> None:
    drawn = Image.linear_gradient("L").convert("RGB").convert(mode)
    actual = processor.process_images([drawn])["pixel_values"]
    expected = processor.process_images([drawn.convert("RGB")])["pixel_values"]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ODD_PAGES)
def test_a_page_is_taken_upright_and_on_white_paper(
    processor: ColQwen3Processor, tmp_path: Path, name: str
) -> None:
    expected, tolerance = expected_page(name)
    with Image.open(write_page(name, tmp_path)) as image:
        image.load()
        before = dict(image.info)
        inputs = processor.process_images([image])
        assert image.info == before
        again = processor.process_images([image])  # and the image itself is left as it was
    plain = processor.process_images([expected])
    assert torch.equal(inputs["image_grid_thw"], plain["image_grid_thw"])
    pixels, expected_pixels = inputs["pixel_values"], plain["pixel_values"]
    # enlarging such a small page may overshoot by a fifth
    bound = 1.2 * tolerance / 127.5 + 1e-6
    torch.testing.assert_close(pixels, expected_pixels, atol=bound, rtol=0)
    assert torch.equal(again["pixel_values"], pixels)


def test_a_page_that_the_reader_has_opened_is_turned_once(
    processor: ColQwen3Processor, tmp_path: Path
) -> None:
    path = write_page("turned 6 jpeg", tmp_path)
    opened = processor.process_images([open_page(Page(path))])
    with Image.open(path) as image:
        direct = processor.process_images([image])
    assert torch.equal(opened["image_grid_thw"], direct["image_grid_thw"])
    assert torch.equal(opened["pixel_values"], direct["pixel_values"])


def test_too_long_a_page_is_refused(processor: ColQwen3Processor) -> None:
    good = Image.new("RGB", (64, 64))
    for size in ((4020, 20), (20, 4020)):
        with pytest.raises(
            ValueError, match=r"^page 2 of 2 is .* pixels: its aspect ratio is over"
        ):
            processor.process_images([good, Image.new("RGB", size)])


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_page_without_pixels_is_refused_by_its_number(
    processor: ColQwen3Processor, size: tuple[int, int]
) -> None:
    pages = [Image.new("RGB", (64, 64)), Image.new("L", size), Image.new("RGB", (64, 64))]
    with pytest.raises(ValueError) as caught:
        processor.process_images(pages)
    width, height = size
    assert str(caught.value) == f"page 2 of 3 is {width} x {height} pixels: it is empty"


def test_saved_processor_is_the_same(processor: ColQwen3Processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = ColQwen3Processor.from_pretrained(str(tmp_path))
    image = Image.linear_gradient("L")
    for expected, actual in (
        (processor.process_images([image]), again.process_images([image])),
        (processor.process_texts(["a", "b c"]), again.process_texts(["a", "b c"])),
    ):
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_call_takes_either_images_or_text(processor: ColQwen3Processor) -> None:
    assert "pixel_values" in processor(images=Image.new("RGB", (64, 64)))
    assert torch.equal(
        processor(text="a")["input_ids"], processor.process_texts(["a"])["input_ids"]
    )
    with pytest.raises(ValueError, match="either images or text"):
        processor()


def test_scores_are_max_sim(processor: ColQwen3Processor) -> None:
    query, page = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    assert processor.score_multi_vector([query], [page]).item() == pytest.approx(1.4)
    # as mteb and colpali-engine call it
    for options in ({"device": "cpu"}, {"batch_size": 1, "device": torch.device("cpu")}):
        scores = processor.score_multi_vector(query[None], [page], **options)
        assert scores.item() == pytest.approx(1.4)


def test_threads_may_share_a_processor() -> None:
    """The embed stage prepares batches in threads."""
    texts = [["total of the year"], ["a", "the total of the year " * 50]]
    alone = [
        ColQwen3Processor.from_pretrained(str(GOLDEN / "model")).process_texts(t) for t in texts
    ]
    shared = ColQwen3Processor.from_pretrained(str(GOLDEN / "model"))
    with ThreadPoolExecutor(8) as threads:
        for i, result in enumerate(threads.map(shared.process_texts, texts * 100)):
            assert torch.equal(result["input_ids"], alone[i % 2]["input_ids"])
