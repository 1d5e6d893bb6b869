"""Page files of every kind that Pillow reads, with the pixels that a viewer shows, known by hand.

Each file is a page of blocks of 8 x 8 pixels: large enough that JPEG keeps the colours.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageCms

BLOCK = 8
WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)
Colour = tuple[int, int, int]
Rows = list[list[Colour]]

UPRIGHT: Rows = [[RED, BLUE, WHITE], [BLACK, WHITE, WHITE]]
"""What every turned page shows."""

STORED: dict[int, Rows] = {
    1: [[RED, BLUE, WHITE], [BLACK, WHITE, WHITE]],
    2: [[WHITE, BLUE, RED], [WHITE, WHITE, BLACK]],
    3: [[WHITE, WHITE, BLACK], [WHITE, BLUE, RED]],
    4: [[BLACK, WHITE, WHITE], [RED, BLUE, WHITE]],
    5: [[RED, BLACK], [BLUE, WHITE], [WHITE, WHITE]],
    6: [[WHITE, WHITE], [BLUE, WHITE], [RED, BLACK]],
    7: [[WHITE, WHITE], [WHITE, BLUE], [BLACK, RED]],
    8: [[BLACK, RED], [WHITE, BLUE], [WHITE, WHITE]],
}
"""EXIF orientation -> the rows as they are stored (EXIF 2.32, tag 274: where row 0 and column 0 lie)."""


def blocks(rows: Iterable[Iterable[object]], mode: str = "RGB") -> Image.Image:
    """Draw rows of blocks."""
    listed = [list(row) for row in rows]
    small = Image.new(mode, (len(listed[0]), len(listed)))
    for y, row in enumerate(listed):
        for x, value in enumerate(row):
            small.putpixel((x, y), value)  # type: ignore[arg-type]
    size = small.width * BLOCK, small.height * BLOCK
    return small.resize(size, Image.Resampling.NEAREST)


def exif(orientation: int) -> Image.Exif:
    """Return EXIF data with an orientation and nothing else."""
    data = Image.Exif()
    data[274] = orientation
    return data


def raw_png(depth: int, colour_type: int, row: bytes, transparent: bytes, width: int = 2) -> bytes:
    """Return a PNG of one row, with a tRNS chunk, as no part of Pillow would write it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    parts = (
        [chunk(b"IHDR", header), chunk(b"tRNS", transparent)]
        if transparent
        else [chunk(b"IHDR", header)]
    )
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the file of an image."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def palette(transparency: bytes | int) -> bytes:
    """Return a palette image: entry 0 is red, entry 1 blue."""
    image = blocks([[0, 1]], "P")
    image.putpalette([*RED, *BLUE])
    return saved(image, transparency=transparency)


def cmyk_profile() -> bytes:
    """Return an ICC profile of CMYK in which full K is red, all inks are black, and else is white.

    No real press prints so: a conversion that ignores the profile gives other colours. The layout
    is that of ICC.1:2010, one `mft1` table of two points per ink.
    """
    lab_white, lab_red = (255, 128, 128), (138, 209, 195)  # L* 100; L* 54.3, a* 80.8, b* 69.9
    curve = bytes(range(256))
    points = [lab_red if point & 1 else lab_white for point in range(15)]  # K varies fastest
    table = b"".join(map(bytes, [*points, (0, 128, 128)]))  # all inks: black
    identity = struct.pack(">9i", *(65536 if i in (0, 4, 8) else 0 for i in range(9)))
    a2b = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + curve * 4 + table + curve * 3
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    copyright_ = b"text" + bytes(4) + b"none\0"
    tags, body = [], b""
    start = 128 + 4 + 12 * 4
    for name, data in ((b"desc", text), (b"cprt", copyright_), (b"wtpt", white), (b"A2B0", a2b)):
        tags.append(struct.pack(">4sII", name, start + len(body), len(data)))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D) + bytes(48)
    return header + struct.pack(">I", len(tags)) + b"".join(tags) + body


def shades(*values: int) -> list[Colour]:
    """Return greys."""
    return [(value, value, value) for value in values]


PAGES: dict[str, tuple[str, Callable[[], bytes], Rows, int]] = {
    **{
        f"turned {turn} jpeg": (
            "page.jpg",
            lambda turn=turn: saved(  # type: ignore[misc]
                blocks(STORED[turn]), "JPEG", quality=100, subsampling=0, exif=exif(turn)
            ),
            UPRIGHT, 2,
        )
        for turn in STORED
    },
    **{
        f"turned {turn} png": (
            "page.png",
            lambda turn=turn: saved(blocks(STORED[turn]), exif=exif(turn)),  # type: ignore[misc]
            UPRIGHT, 0,
        )
        for turn in (3, 6)
    },
    "no such turn": ("page.png", lambda: saved(blocks(UPRIGHT), exif=exif(9)), UPRIGHT, 0),
    "damaged exif": ("page.png", lambda: saved(blocks(UPRIGHT), exif=b"Exif\0\0MM?"), UPRIGHT, 0),
    "turned 16-bit grey": (
        "page.png",
        lambda: saved(blocks([[256 * 10], [256 * 200]], "I;16"), exif=exif(6)),
        [shades(200, 10)], 0,
    ),
    "rgba": (
        "page.png",
        lambda: saved(blocks([[(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 255, 51)]], "RGBA")),
        [[RED, WHITE, (204, 204, 255)]], 0,
    ),
    "turned rgba": (
        "page.png",
        lambda: saved(blocks([[(255, 0, 0, 255)], [(0, 0, 0, 0)]], "RGBA"), exif=exif(8)),
        [[RED, WHITE]], 0,
    ),
    "grey and alpha": (
        "page.png",
        lambda: saved(blocks([[(100, 255), (100, 0), (0, 127)]], "LA")),
        [shades(100, 255, 128)], 0,
    ),
    "palette, alpha as bytes": ("page.png", lambda: palette(b"\xff\x33"), [[RED, (204, 204, 255)]], 0),
    "palette, transparent index": ("page.png", lambda: palette(0), [[WHITE, BLUE]], 0),
    "rgb with a colour key": (
        "page.png",
        lambda: saved(blocks([[(1, 2, 3), (4, 5, 6)]]), transparency=(1, 2, 3)),
        [[WHITE, (4, 5, 6)]], 0,
    ),
    "grey with a key": (
        "page.png", lambda: saved(blocks([[7, 9]], "L"), transparency=7), [shades(255, 9)], 0,
    ),
    "bilevel with a key": (
        "page.png", lambda: raw_png(1, 0, bytes([0b01000000]), b"\0\0"), [shades(255, 255)], 0,
    ),
    "16-bit rgb with a key": (
        "page.png",
        lambda: raw_png(16, 2, struct.pack(">6H", 256, 512, 768, 0, 0, 256), struct.pack(">3H", 256, 512, 768)),
        [[WHITE, (0, 0, 1)]], 0,
    ),
    "16-bit grey": (
        "page.png", lambda: saved(blocks([[0, 255, 256, 65535]], "I;16")), [shades(0, 0, 1, 255)], 0,
    ),
    "16-bit grey with a key": (
        "page.png",
        lambda: raw_png(16, 0, struct.pack(">2H", 300, 301), struct.pack(">H", 300)),
        [shades(255, 1)], 0,
    ),
    "16-bit grey and alpha": (
        "page.png",
        lambda: raw_png(16, 4, struct.pack(">4H", 40000, 65535, 40000, 0), b""),
        [shades(156, 255)], 0,
    ),
    "16-bit rgba": (
        "page.png",
        lambda: raw_png(16, 6, struct.pack(">8H", 40000, 0, 0, 65535, 40000, 0, 0, 0), b""),
        [[(156, 0, 0), WHITE]], 0,
    ),
    "bilevel": ("page.png", lambda: saved(blocks([[0, 1]], "1")), [shades(0, 255)], 0),
    "grey": ("page.png", lambda: saved(blocks([[3, 250]], "L")), [shades(3, 250)], 0),
    "cmyk": (
        "page.jpg",
        lambda: saved(blocks([[(0, 0, 0, 0), (0, 0, 0, 255), (0, 255, 255, 0)]], "CMYK"), "JPEG", quality=100),
        [[WHITE, BLACK, RED]], 2,
    ),
    "cmyk with a profile": (
        "page.jpg",
        lambda: saved(
            blocks([[(0, 0, 0, 0), (0, 0, 0, 255), (255, 255, 255, 255), (255, 255, 255, 0)]], "CMYK"),
            "JPEG", quality=100, icc_profile=cmyk_profile(),
        ),
        [[WHITE, RED, BLACK, WHITE]], 16,
    ),
    "cmyk with a damaged profile": (
        "page.jpg",
        lambda: saved(
            blocks([[(0, 0, 0, 0), (0, 0, 0, 255)]], "CMYK"), "JPEG", quality=100, icc_profile=b"icc" * 90
        ),
        [shades(255, 0)], 2,
    ),
    "cmyk with the profile of another mode": (
        "page.jpg",
        lambda: saved(
            blocks([[(0, 0, 0, 0), (0, 0, 0, 255)]], "CMYK"), "JPEG", quality=100,
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ),
        [shades(255, 0)], 2,
    ),
}  # fmt: skip
"""Name -> file name, what makes its bytes, the blocks that a viewer shows, and JPEG's tolerance."""


def write_page(name: str, folder: Path) -> Path:
    """Write one of `PAGES`."""
    file, make, _, _ = PAGES[name]
    path = folder / file
    path.write_bytes(make())
    return path


def expected_page(name: str) -> tuple[Image.Image, int]:
    """Return the RGB image that a page of `PAGES` shows, and by how much JPEG may move a colour."""
    _, make, rows, tolerance = PAGES[name]
    image = blocks(rows)
    with Image.open(io.BytesIO(make())) as stored:
        if stored.height == 1:  # one of those written byte by byte, which have no blocks
            image = image.resize((len(rows[0]), 1), Image.Resampling.NEAREST)
    return image, tolerance
