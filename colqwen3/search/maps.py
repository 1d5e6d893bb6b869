"""Where on a page a query matches: the map of its visual tokens, and the page drawn under it.

Each cell of 32 x 32 pixels of the resized page, one visual token, is coloured by the score that the
page would get if it had that token alone, divided by the number of query tokens: the mean cosine of
the query's tokens (the augmentation tokens too, which MaxSim counts) with the cell.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps

from colqwen3.system.errors import UserError

# from white, which leaves the page as it is, to red; darker is a better match
COLOURS = ((255, 255, 255), (255, 237, 160), (254, 178, 76), (252, 98, 42), (214, 24, 32))
DARKEST = 48  # grey that black is shown as
STEPS = 16  # of the colours, times 16 greys: the 256 entries of a PNG palette

Map = NDArray[np.float64]


def colour(values: Map, low: float, high: float) -> Image.Image:
    """Return one pixel a value, by the scale from `low` (or less) to `high` in STEPS colours."""
    position = (values - low) / (high - low) if high > low else np.zeros_like(values)
    step = np.clip(np.floor(position * STEPS), 0, STEPS - 1).astype(int)
    return Image.fromarray(scale_colours()[step])


def scale_colours() -> NDArray[np.uint8]:
    """Return the STEPS colours of the scale [STEPS, 3]."""
    here, stops = np.linspace(0, 1, STEPS), np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(here, stops, channel) for channel in zip(*COLOURS, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def overlay(page: Image.Image, values: Map, low: float, high: float, height: int) -> Image.Image:
    """Return the page in grey with its cells coloured, shrunk or enlarged to fit.

    Multiplying keeps print darker than its cell, whatever the colour. That needs a light page: a
    dark one is shown as its negative, and black is lifted a little.
    """
    rows, columns = values.shape
    scale = min(height / rows, 0.8 * height / columns)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    grey = page.convert("RGB").convert("L").resize(size, Image.Resampling.LANCZOS)
    if np.asarray(grey).mean() < 128:
        grey = ImageOps.invert(grey)
    lifted = grey.point([round(DARKEST + level * (255 - DARKEST) / 255) for level in range(256)])
    cells = colour(values, low, high).resize(size, Image.Resampling.NEAREST)
    return ImageChops.multiply(lifted.convert("RGB"), cells)


def visual_tokens(processor: Any, page: Image.Image) -> tuple[NDArray[np.bool_], tuple[int, int]]:
    """Return which of a page's tokens are visual ones, and the rows and columns of their grid.

    The processor itself lays the page out: its visual tokens are those that carry the id of the
    image placeholder, in row-major order of the grid of patches merged 2 x 2.
    """
    from colqwen3.model.processing_colqwen3 import IMAGE_TOKEN

    inputs = processor.process_images([page])
    placeholder = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    _, height, width = inputs["image_grid_thw"][0].tolist()
    merge = processor.image_processor.merge_size
    visual: NDArray[np.bool_] = (inputs["input_ids"][0] == placeholder).numpy()
    return visual, (height // merge, width // merge)


def similarity_map(
    query: torch.Tensor, page: torch.Tensor, visual: NDArray[np.bool_], grid: tuple[int, int]
) -> Map:
    """Return the mean cosine of the query's tokens with each visual token, [rows, columns].

    Raises
    ------
    UserError
        If the page's embeddings have another number of tokens than the processor now gives it.
    """
    if len(page) != len(visual) or visual.sum() != grid[0] * grid[1]:
        raise UserError(
            f"the page of the heat map has {len(page)} embedded tokens, but {len(visual)} by the "
            f"processor; embed both again"
        )
    similarities = _finite(query).double() @ _finite(page).double()[torch.from_numpy(visual)].T
    means: Map = similarities.mean(0).reshape(grid).numpy()
    return means


def _finite(tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens with those that hold NaN or Inf as zero vectors."""
    return tokens.masked_fill(~tokens.isfinite().all(-1, keepdim=True), 0)
