"""Finding and opening pages: images, PDFs, and what is wrong with them."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageCms, ImageDraw

from colqwen3.dataset import pages
from colqwen3.dataset.pages import Page, find_pages, open_page
from colqwen3.model import processing_colqwen3
from tests.helpers.odd_pages import PAGES, expected_page, write_page
from tests.helpers.refusal import refusal

# a standard security handler whose password nobody has
LOCK = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%(key)s>/U<%(key)s>>>/ID[<00><00>]"
LOCK %= {b"key": b"00" * 32}


def sheet(number: int, size: tuple[int, int] = (200, 250)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 10, 60, 60), fill=(200, 30, 30))  # red, so that swapped channels show
    draw.text((80, 100), str(number), fill="black", font_size=60)
    return image


def pdf(path: Path, pages: int, resolution: float = 100) -> Path:
    first, *rest = [sheet(number) for number in range(1, pages + 1)]
    first.save(path, "PDF", save_all=True, append_images=rest, resolution=resolution)
    return path


def raw_pdf(path: Path, kids: bytes, count: int, box: bytes = b"0 0 72 72") -> Path:
    """A PDF that no writer would make; pdfium rebuilds the table that it lacks."""
    path.write_bytes(
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[" + kids + b"]/Count " + str(count).encode() + b">>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[" + box + b"]>>endobj\n"
        b"trailer<</Root 1 0 R>>\n%%EOF"
    )
    return path


def png(folder: Path, size: tuple[int, int] = (64, 64)) -> Path:
    path = folder / "page.png"
    Image.effect_noise(size, 64).save(path)
    return path


def test_finds_images_and_pages_of_pdfs_in_order(tmp_path: Path) -> None:
    pdf(tmp_path / "m.PDF", 11)
    pdf(tmp_path / "z.pdf", 1)
    for name in ("b.png", "m-0.jpg", "m-01.JPEG", "zz.d.png"):
        sheet(0).save(tmp_path / name)
    by_id = find_pages(tmp_path)
    assert list(by_id) == [
        "b", *(f"m-{number}" for number in (0, "01")), *(f"m-{n}" for n in range(1, 12)),
        "z-1", "zz.d",
    ]  # fmt: skip
    assert by_id["m-11"] == Page(tmp_path / "m.PDF", 11)
    assert (by_id["m-11"].name, by_id["m-0"].name) == ("m.PDF#page=11", "m-0.jpg")
    assert str(by_id["m-11"]) == f"{tmp_path}/m.PDF#page=11"
    assert all(page.id == name for name, page in by_id.items())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jpg", "a.png"), "a.png: has the same id as a.jpg, 'a'; rename one"),
        (("m-2.png", "m.pdf"), "m.pdf#page=2: has the same id as m-2.png, 'm-2'; rename one"),
        (("m.PDF", "m.pdf"), "m.pdf#page=1: has the same id as m.PDF#page=1, 'm-1'; rename one"),
    ],
)
def test_refuses_two_pages_of_one_id(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        if name.lower().endswith("pdf"):
            pdf(tmp_path / name, 2)
        else:
            sheet(0).save(tmp_path / name)
    assert refusal(find_pages, tmp_path) == f"{tmp_path}/{message}"


def test_refuses_a_corpus_without_pages(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert "contains no PNG, JPEG or PDF" in refusal(find_pages, tmp_path)


def test_names_the_files_that_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    png(tmp_path)
    (tmp_path / "scan.tiff").write_bytes(b"")
    (tmp_path / ".desktop").write_bytes(b"")
    assert set(find_pages(tmp_path)) == {"page"}
    assert "skipped 1 entries" in caplog.text
    assert "scan.tiff" in caplog.text


def test_names_links_to_nothing_pipes_and_folders_that_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    png(tmp_path)
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "b.pdf").mkdir()
    os.mkfifo(tmp_path / "c.jpg")  # opening it would wait for ever
    assert set(find_pages(tmp_path)) == {"page"}
    assert caplog.messages == [
        f"{tmp_path}: skipped 3 entries that are not a PNG, JPEG or PDF file: "
        "a.png (a link to nothing), b.pdf (a folder), c.jpg (not a file)"
    ]
    for number in range(6):
        (tmp_path / f"d{number}.txt").touch()
    find_pages(tmp_path)
    assert caplog.messages[-1].endswith(
        "skipped 9 entries that are not a PNG, JPEG or PDF file: "
        "a.png (a link to nothing), b.pdf (a folder), c.jpg (not a file), d0.txt, d1.txt, ..."
    )


def test_renders_the_right_page_of_a_pdf_at_100_dpi(tmp_path: Path) -> None:
    by_id = find_pages(pdf(tmp_path / "m.pdf", 3).parent)
    for number in (3, 1, 2):
        image = open_page(by_id[f"m-{number}"])
        assert (image.mode, image.size) == ("RGB", (200, 250))
        # Pillow's PDFs hold JPEGs: grey levels differ a little, another digit by far
        differences = [
            sum(ImageChops.difference(image, sheet(other)).convert("L").histogram()[100:])
            for other in (1, 2, 3)
        ]
        assert differences.index(min(differences)) == number - 1
        assert differences[number - 1] < 20
        red, green, blue = image.getpixel((30, 30))  # type: ignore[misc]
        assert red > 180
        assert max(green, blue) < 60
    (tmp_path / "half").mkdir()
    half = pdf(tmp_path / "half" / "m.pdf", 1, resolution=50)
    assert open_page(Page(half, 1)).size == (400, 500)


def test_a_rendered_page_outlives_its_file(tmp_path: Path) -> None:
    path = pdf(tmp_path / "m.pdf", 1)
    image, again = open_page(Page(path, 1)), open_page(Page(path, 1))
    path.unlink()
    assert image.tobytes() == again.tobytes()


def test_refuses_bad_pdfs(tmp_path: Path) -> None:
    path = pdf(tmp_path / "m.pdf", 2)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"trailer\n<<", b"trailer\n<<" + LOCK))
    assert refusal(find_pages, tmp_path) == f"{path}: is encrypted; save it without a password"
    for damaged in (whole[: len(whole) // 2], whole[:-200], b"%PDF-1.7", b"no pdf"):
        path.write_bytes(damaged)
        assert refusal(find_pages, tmp_path).startswith(f"{path}: is damaged")
    path.write_bytes(b"")
    assert refusal(find_pages, tmp_path).startswith(f"{path}: is empty")
    raw_pdf(path, b"", 0)
    assert refusal(find_pages, tmp_path).startswith(
        f"{path}: is damaged, not a PDF, or has no pages"
    )
    path.unlink()
    assert refusal(open_page, Page(path, 1)).startswith(f"{path}: cannot be read")


def test_refuses_a_page_that_its_pdf_lacks(tmp_path: Path) -> None:
    path = raw_pdf(tmp_path / "m.pdf", b"3 0 R 9 0 R", 2)
    assert list(find_pages(tmp_path)) == ["m-1", "m-2"]
    assert open_page(Page(path, 1)).size == (100, 100)
    assert refusal(open_page, Page(path, 2)).startswith(f"{path}#page=2: cannot be rendered")


def test_refuses_a_pdf_page_as_large_as_a_bomb(tmp_path: Path) -> None:
    path = raw_pdf(tmp_path / "m.pdf", b"3 0 R", 1, b"0 0 14400 14400")
    assert "m.pdf#page=1: has more than 89478485 pixels" in refusal(open_page, Page(path, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA"])
def test_opens_an_image_whole_in_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "page.png"
    drawn = Image.linear_gradient("L").resize((31, 17)).convert(mode)
    drawn.save(path)
    page = open_page(Page(path))
    path.unlink()
    assert (page.mode, page.size) == ("RGB", (31, 17))
    assert page.tobytes() == drawn.convert("RGBA").convert("RGB").tobytes()  # all opaque


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_upright_and_on_white_paper(tmp_path: Path, name: str) -> None:
    page = open_page(Page(write_page(name, tmp_path)))
    expected, tolerance = expected_page(name)
    assert (page.mode, page.size) == (expected.mode, expected.size)
    differences = ImageChops.difference(page, expected).getextrema()
    assert max(high for _, high in differences) <= tolerance  # type: ignore[misc]
    assert page.getexif().get(274) is None  # whoever reads it next must not turn it again


def test_reader_and_processor_share_their_code_word_for_word() -> None:
    """The processor travels with checkpoints, so it cannot import the reader."""
    for name in ("to_rgb", "_cmyk_to_srgb"):
        reader, processor = (getattr(module, name) for module in (pages, processing_colqwen3))
        assert inspect.getsource(reader) == inspect.getsource(processor)
    assert pages.TURNS == processing_colqwen3.TURNS


def test_a_page_without_littlecms_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("The _imagingcms C module is not installed")

    monkeypatch.setattr(ImageCms, "createProfile", missing)
    page = open_page(Page(write_page("cmyk with a profile", tmp_path)))
    assert page.getpixel((12, 4)) == (0, 0, 0)  # K as ink, not as the profile has it


def test_refuses_unreadable_images(tmp_path: Path) -> None:
    path = png(tmp_path)
    page = Page(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refusal(open_page, page).startswith(f"{path}: cannot be read")
    path.write_bytes(whole[:100] + bytes(100) + whole[200:])
    assert refusal(open_page, page).startswith(f"{path}: cannot be read")
    path.write_bytes(b"")
    assert refusal(open_page, page).startswith(f"{path}: is empty")
    path.write_text("no image")
    assert refusal(open_page, page).startswith(f"{path}: is not a PNG or JPEG image")
    path.unlink()
    assert "No such file" in refusal(open_page, page)


def test_refuses_another_format_under_the_name_of_a_page(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    Image.new("L", (4, 4)).save(path, "GIF")
    assert "is not a PNG or JPEG image" in refusal(open_page, Page(path))


@pytest.mark.parametrize("limit", [4095, 1000])  # Pillow warns of the first, refuses the second
def test_refuses_a_decompression_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert f"more than {limit} pixels" in refusal(open_page, Page(png(tmp_path)))


def test_opens_the_largest_allowed_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4096)
    assert open_page(Page(png(tmp_path))).size == (64, 64)


def test_sets_of_images_load_no_pdf_library(tmp_path: Path) -> None:
    png(tmp_path)
    code = (
        "import pathlib, sys; from colqwen3.dataset.pages import find_pages, open_page;"
        "[open_page(p) for p in find_pages(pathlib.Path(sys.argv[1])).values()];"
        "sys.exit('pypdfium2' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize(("size", "fits"), [((200, 1), True), ((201, 1), False), ((1, 201), False)])
def test_refuses_a_ribbon(tmp_path: Path, size: tuple[int, int], fits: bool) -> None:
    Image.new("L", size).save(tmp_path / "p.png")
    if fits:
        assert open_page(Page(tmp_path / "p.png")).size == size
    else:
        said = refusal(open_page, Page(tmp_path / "p.png"))
        assert re.search(r"p\.png: is .* times as long as wide; crop", said)


def test_16_bits_become_the_same_greys_in_8(tmp_path: Path) -> None:
    greys = Image.linear_gradient("L")
    wide = greys.convert("I").point(lambda value: value * 257)
    wide.convert("I;16").save(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as stored:
        assert stored.mode == "I;16"
    assert open_page(Page(tmp_path / "p.png")).tobytes() == greys.convert("RGB").tobytes()
