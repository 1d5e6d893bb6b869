"""Pages cut into the patches that a ColQwen3 sees, in 8 bits, without torch or transformers.

A process that prepares pages imports nothing more: it starts in a tenth of a second and takes some
60 MB. The arithmetic is that of `ColQwen3Processor.cut_page`, which travels with checkpoints and so
can import nothing from here; a test holds the two equal.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

Grid = tuple[int, int, int]
"""Frames, patch rows and patch columns of a page."""


class PreparedPage(NamedTuple):
    """A page as patches.

    Attributes
    ----------
    patches
        Bytes [patches, channels x patch x patch], those of one visual token in a row.
    grid
        Frames, patch rows and patch columns.
    """

    patches: NDArray[np.uint8]
    grid: Grid


@dataclass(frozen=True)
class Cutter:
    """What resizes a page as the Qwen2-VL image processor does, and cuts it into patches.

    Attributes
    ----------
    patch, merge
        Pixels per side of a patch, and patches per side of a visual token.
    shortest, longest
        Minimum and maximum number of pixels of a resized page.
    resample
        Pillow's number of the resampling filter.
    """

    patch: int
    merge: int
    shortest: int
    longest: int
    resample: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height that a page is resized to (Qwen2-VL's ``smart_resize``)."""
        side = self.patch * self.merge
        columns, rows = round(width / side), round(height / side)
        if rows * columns * side * side > self.longest:
            shrink = math.sqrt(height * width / self.longest)
            columns, rows = (max(1, math.floor(x / shrink / side)) for x in (width, height))
        elif rows * columns * side * side < self.shortest:
            grow = math.sqrt(self.shortest / (height * width))
            columns, rows = (math.ceil(x * grow / side) for x in (width, height))
        return columns * side, rows * side

    def visual_tokens(self, grid: Grid) -> int:
        """Return the number of visual tokens of a page."""
        return math.prod(grid) // self.merge**2

    def cut(self, image: Image.Image) -> PreparedPage:
        """Resize an RGB page and cut it into patches."""
        image = _without_colour(image)
        width, height = self.size(*image.size)
        image = image.resize((width, height), Image.Resampling(self.resample))
        patch, merge = self.patch, self.merge
        rows, columns = height // patch, width // patch
        pixels = np.asarray(image).reshape(
            rows // merge, merge, patch, columns // merge, merge, patch, -1
        )
        patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5)
        rgb = np.broadcast_to(patches, (*patches.shape[:4], 3, patch, patch))
        return PreparedPage(rgb.reshape(rows * columns, -1), (1, rows, columns))


def _without_colour(image: Image.Image) -> Image.Image:
    """Return an RGB page whose three channels are equal as one channel: a third of the work."""
    red, *others = image.split()
    if any(ImageChops.difference(red, other).getbbox() for other in others):
        return image
    return red
