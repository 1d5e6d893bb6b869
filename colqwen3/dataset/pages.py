"""Pages of a document set: image files, and the pages of PDFs, rendered when they are opened."""

import io
import logging
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from colqwen3.system.errors import UserError

logger = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg")
PDF = ".pdf"
# A4 and Letter then have 0.97 and 0.94 million pixels, within the 1.31 million that a ColQwen3 sees
# by default: nothing is rendered only to be shrunk, and small print stays as sharp as possible.
DPI = 100
POINTS_PER_INCH = 72
SHOWN = 5  # names of files that are left out
MAX_RATIO = 200  # Qwen's processor takes nothing longer
ENCRYPTED = (4, 5)  # pdfium: a password is needed; the security scheme is unknown
# TURNS and to_rgb are as in colqwen3/model/processing_colqwen3.py, which travels with checkpoints
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what sets the page upright."""


@dataclass(frozen=True)
class Page:
    """Where one page comes from: an image file, or a page of a PDF.

    Attributes
    ----------
    path
        The file.
    number
        Which page of the PDF, counted from 1 whatever is printed on it; None for an image.
    """

    path: Path
    number: int | None = None

    @property
    def id(self) -> str:
        """What qrels.tsv calls it: ``<stem>``, or ``<stem>-<number>`` for a page of a PDF.

        In Unicode normalisation form C, whichever form the disk or an archive has given the name.
        """
        stem = normalized(self.path.stem)
        return stem if self.number is None else f"{stem}-{self.number}"

    @property
    def name(self) -> str:
        """The file name; for a page of a PDF with its number, as URLs write it (RFC 8118)."""
        return self.path.name if self.number is None else f"{self.path.name}#page={self.number}"

    def __str__(self) -> str:
        return str(self.path.with_name(self.name))


def find_pages(folder: Path) -> dict[str, Page]:
    """Return the pages of a folder by id, sorted by file name, those of a PDF in its own order.

    A PNG or JPEG file is one page, its id the stem. Every page of a PDF is one, its id
    ``<stem>-<number>``, counted from 1 and not padded, so that ids stay when a PDF grows:
    ``manual.pdf`` gives ``manual-1``, ``manual-2``, ... Images are listed, PDFs opened to count.

    Raises
    ------
    UserError
        If there is no folder, no page in it, two pages of one id, or an unreadable PDF.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        reason = error.strerror
        fix = "give the folder of pages" if folder.is_file() else "give the pages there"
        raise UserError(f"{folder}: cannot be read ({reason}); {fix}") from None
    # names with a leading dot are left by desktops and archivers next to the real files
    entries = [path for path in entries if not path.name.startswith(".")]
    pages: dict[str, Page] = {}
    others = []
    for path in entries:
        if not path.is_file() or path.suffix.lower() not in (*IMAGES, PDF):
            others.append(_describe(path))
            continue
        check_name(path.stem, f"{folder}: the file name {path.name!r}")
        for page in _pages_of(path):
            if page.id in pages:
                known = pages[page.id].name
                raise UserError(f"{page}: has the same id as {known}, {page.id!r}; rename one")
            pages[page.id] = page
    if not pages:
        raise UserError(f"{folder}: contains no PNG, JPEG or PDF; put the pages there")
    if others:
        shown = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        logger.warning(
            "%s: skipped %d entries that are not a PNG, JPEG or PDF file: %s",
            folder,
            len(others),
            shown,
        )
    return pages


def _describe(path: Path) -> str:
    """Return the name of an entry that is not a page, and its kind unless it is a file."""
    if path.is_file():
        return path.name
    if path.is_dir():
        return f"{path.name} (a folder)"
    return f"{path.name} (a link to nothing)" if path.is_symlink() else f"{path.name} (not a file)"


def normalized(name: str) -> str:
    """Return a name in Unicode normalisation form C: macOS and some archivers write form D."""
    return unicodedata.normalize("NFC", name)


def _pages_of(path: Path) -> list[Page]:
    if path.suffix.lower() != PDF:
        return [Page(path)]
    return [Page(path, number) for number in range(1, count_pages(path) + 1)]


def count_pages(path: Path) -> int:
    """Return the number of pages of a PDF.

    Raises
    ------
    UserError
        If the file is missing, damaged, empty or encrypted.
    """
    with _open_pdf(path) as document:
        return len(document)


def open_page(page: Page) -> Image.Image:
    """Read a page in 8-bit RGB: an image as `to_rgb` gives it, or a PDF page at 100 dpi with forms.

    Raises
    ------
    UserError
        If the file is missing, damaged, empty, of another format or encrypted, or the page has
        more pixels than Pillow accepts, or is more than 200 times as long as wide.
    """
    image = _read_image(page.path) if page.number is None else _render(page, page.number)
    if max(image.size) > MAX_RATIO * min(image.size):
        width, height = image.size
        raise UserError(
            f"{page}: is {width} x {height} pixels, more than {MAX_RATIO} times as long as wide; "
            "crop or split it"
        )
    return image


def _read_image(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # by content: what a file is called does not choose the decoder
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                image.load()
                return to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large(path) from None
    except UnidentifiedImageError:
        reason = "is empty" if path.stat().st_size == 0 else "is not a PNG or JPEG image"
        raise UserError(f"{path}: {reason}; replace or remove it") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); replace or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a page as a viewer shows it: upright, in 8-bit RGB, transparency on white paper.

    EXIF orientation is applied, also where XMP states it. 16-bit grey becomes 8-bit: Pillow would
    turn all but its darkest greys white. CMYK goes through its ICC profile to sRGB where it has a
    usable one; profiles of RGB and grey pages, which change little, are ignored.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a viewer shows a page with damaged EXIF data as it is stored
        turn = None
    key = image.info.get("transparency")
    if turn is not None:
        image = image.transpose(turn)
    alpha = None
    if image.mode.startswith("I"):
        wide = image.convert("I")
        if isinstance(key, int):
            alpha = wide.point([255 * (value != key) for value in range(1 << 16)], "L")
        image = wide.point([value >> 8 for value in range(1 << 16)], "L")
    elif image.mode == "CMYK":
        image = _cmyk_to_srgb(image)
    elif image.has_transparency_data:
        if isinstance(key, tuple) and max(key) > 255:  # of 16-bit RGB, which Pillow reads as 8-bit
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in key)
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    page = image.convert("RGB")
    if alpha is not None:
        paper = Image.new("RGB", page.size, "white")
        paper.paste(page, mask=alpha)
        page = paper
    page.info.clear()  # a page is not turned or made transparent twice
    return page


def _cmyk_to_srgb(image: Image.Image) -> Image.Image:
    """Return a CMYK image in sRGB, by its ICC profile if it has one that Pillow can use."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImportError, OSError, ImageCms.PyCMSError):  # no littlecms, or a damaged profile
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")


def _render(page: Page, number: int) -> Image.Image:
    from pypdfium2 import PdfiumError

    scale = DPI / POINTS_PER_INCH
    with _open_pdf(page.path) as document:
        try:
            document.init_forms()  # otherwise what was typed into a form is not drawn
            drawn = document[number - 1]
            limit = Image.MAX_IMAGE_PIXELS  # a page may declare a width of 5 m: a bitmap of 1 GB
            if limit and drawn.get_width() * drawn.get_height() * scale**2 > limit:
                raise _too_large(page)
            image: Image.Image = drawn.render(scale=scale).to_pil()
        except PdfiumError as error:
            raise UserError(
                f"{page}: cannot be rendered ({error}); replace or remove the PDF"
            ) from None
    return image


@contextmanager
def _open_pdf(path: Path) -> Iterator[Any]:
    """Open a PDF of at least one page that needs no password."""
    from pypdfium2 import PdfDocument, PdfiumError  # here: sets of images need no native library

    try:
        document = PdfDocument(path)
    except OSError:
        raise UserError(f"{path}: cannot be read (no such file); replace it") from None
    except PdfiumError as error:
        if error.err_code in ENCRYPTED:
            raise UserError(f"{path}: is encrypted; save it without a password") from None
        empty = path.stat().st_size == 0
        reason = "is empty" if empty else "is damaged, not a PDF, or has no pages"
        raise UserError(f"{path}: {reason}; replace or remove it") from None
    with document:
        yield document


def _too_large(page: Path | Page) -> UserError:
    return UserError(f"{page}: has more than {Image.MAX_IMAGE_PIXELS} pixels; shrink it")


def check_name(name: str, what: str) -> None:
    """Reject a name that later files and libraries could not hold.

    Raises
    ------
    UserError
        If it is blank or contains unprintable characters; `what` says whose name it is.
    """
    if not name.strip() or not name.isprintable():
        raise UserError(f"{what} is blank or contains unprintable characters; rename it")
