"""Batches of queries and pages that bound the memory, and the plain forward of one batch."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from PIL import Image

from colqwen3.dataset.patches import Grid, PreparedPage
from colqwen3.system.errors import UserError

LONG_TEXT = 4096  # characters
Key = TypeVar("Key")
Group = TypeVar("Group", bound=Hashable)
Page = TypeVar("Page")


def page_batches(
    pages: Iterable[tuple[Key, Page]], count: Callable[[Page], int], visual_tokens: int
) -> Iterator[tuple[list[Key], list[Page]]]:
    """Yield pages in input order, in batches that stay within a budget of visual tokens.

    The budget counts what the batch occupies once padded: its size times its longest page. A page
    beyond the budget goes alone. No more than a batch and one page are held at a time.

    Parameters
    ----------
    pages
        Each with a key.
    count
        The number of visual tokens of a page.
    visual_tokens
        The budget.
    """
    keys: list[Key] = []
    batch: list[Page] = []
    longest = 0
    for key, page in pages:
        tokens = count(page)
        longest = max(longest, tokens)
        if keys and (len(keys) + 1) * longest > visual_tokens:
            yield keys, batch
            keys, batch, longest = [], [], tokens
        keys.append(key)
        batch.append(page)
    if keys:
        yield keys, batch


def like_size_batches(
    pages: Iterable[tuple[Group, Key, PreparedPage]],
    count: Callable[[Grid], int],
    visual_tokens: int,
    held: int = 64,
) -> Iterator[tuple[list[tuple[Group, Key]], list[PreparedPage]]]:
    """Yield prepared pages in batches of one grid as far as possible: nothing is padded then.

    A batch never spans two groups, and depends on nothing outside of its group: a group that is
    embedded alone, or elsewhere, gets the same bits.

    Parameters
    ----------
    pages
        Each with its group and a key; the pages of a group in a row.
    count
        The number of visual tokens of a grid.
    visual_tokens
        Budget of a batch, see `page_batches`.
    held
        How many pages wait for others of their grid; those that still wait then, or at the end of
        the group, go together in the order of their sizes.
    """
    waiting: dict[Grid, list[tuple[tuple[Group, Key], PreparedPage]]] = {}
    current: Any = None

    def rest() -> Iterator[tuple[list[tuple[Group, Key]], list[PreparedPage]]]:
        left = [pair for _, pairs in sorted(waiting.items()) for pair in pairs]
        left.sort(key=lambda pair: count(pair[1].grid))
        waiting.clear()
        yield from page_batches(left, lambda page: count(page.grid), visual_tokens)

    for group, key, page in pages:
        if group != current:
            yield from rest()
            current = group
        pairs = waiting.setdefault(page.grid, [])
        pairs.append(((group, key), page))
        if (len(pairs) + 1) * count(page.grid) > visual_tokens:
            keys, batch = zip(*waiting.pop(page.grid), strict=True)
            yield list(keys), list(batch)
        elif sum(map(len, waiting.values())) >= held:
            yield from rest()
    yield from rest()


def prepare_image(name: str, image: Image.Image, processor: Any) -> PreparedPage:
    """Cut a page that is in memory into patches; `name` is for the error.

    Raises
    ------
    UserError
        If the page has no pixels, or is more than 200 times as long as wide.
    """
    from colqwen3.model.processing_colqwen3 import to_rgb

    try:
        return PreparedPage(*processor.cut_page(to_rgb(image)))
    except (ValueError, ZeroDivisionError) as error:
        where = getattr(image, "filename", "") or f"page {name!r}"
        problem = "has no pixels; replace" if 0 in image.size else f"{error}; crop"
        raise UserError(f"{where}: {problem} the page") from None


@torch.inference_mode()
def embed(model: Any, inputs: Any) -> list[torch.Tensor]:
    """Embed one batch; return a float32 [tokens, embed_dim] tensor per item, without padding."""
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    embeddings = model(**inputs).embeddings.float().cpu()
    mask = inputs["attention_mask"].bool().cpu()
    return [vectors[tokens] for vectors, tokens in zip(embeddings, mask, strict=True)]


def text_batches(texts: Mapping[str, str], maximum: int) -> Iterator[list[str]]:
    """Yield names in input order, `maximum` at a time; a long text goes alone.

    Every text of a batch is padded to its longest, and attention over 16 texts of ten thousand
    words would need a mask of gigabytes.
    """
    batch: list[str] = []
    for name, text in texts.items():
        long = len(text) > LONG_TEXT
        if batch and (long or len(batch) == maximum):
            yield batch
            batch = []
        batch.append(name)
        if long:
            yield batch
            batch = []
    if batch:
        yield batch
