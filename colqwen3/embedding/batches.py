"""Queries and pages to embeddings, in batches that bound the memory."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from colqwen3.dataset.pages import Page, open_page
from colqwen3.system.errors import UserError

LONG_TEXT = 4096  # characters
# batches prepared ahead: resizing a page takes a core twice as long as an H100 takes to embed it
AHEAD = min(4, os.cpu_count() or 1)


def page_batches(
    pages: Iterable[tuple[str, Image.Image]], processor: Any, visual_tokens: int
) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Yield named pages in input order, in batches that stay within a budget of visual tokens.

    The budget counts what the batch occupies once padded: its size times its longest page. A page
    beyond the budget goes alone. No more than a batch and one page are held at a time.
    """
    names: list[str] = []
    images: list[Image.Image] = []
    longest = 0
    for name, image in pages:
        count = count_visual_tokens(name, image, processor)
        longest = max(longest, count)
        if names and (len(names) + 1) * longest > visual_tokens:
            yield names, images
            names, images, longest = [], [], count
        names.append(name)
        images.append(image)
    if names:
        yield names, images


def count_visual_tokens(name: str, image: Image.Image, processor: Any) -> int:
    """Return the number of visual tokens of a page; `name` is for the error.

    Raises
    ------
    UserError
        If the page has no pixels, or is more than 200 times as long as wide.
    """
    images = processor.image_processor
    limits = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
    try:
        patches = images.get_number_of_image_patches(image.height, image.width, limits)
    except (ValueError, ZeroDivisionError) as error:
        where = getattr(image, "filename", "") or f"page {name!r}"
        problem = "has no pixels; replace" if 0 in image.size else f"{error}; crop"
        raise UserError(f"{where}: {problem} the page") from None
    return int(patches) // int(images.merge_size) ** 2


def prepare_ahead(
    batches: Iterable[tuple[list[str], list[Image.Image]]], processor: Any
) -> Iterator[tuple[list[str], Any]]:
    """Yield names and model inputs of each batch in order, the next `AHEAD` prepared meanwhile."""
    with ThreadPoolExecutor(AHEAD) as threads:
        waiting: deque[tuple[list[str], Any]] = deque()
        for names, images in batches:
            waiting.append((names, threads.submit(processor.process_images, images)))
            if len(waiting) > AHEAD:
                ready, inputs = waiting.popleft()
                yield ready, inputs.result()
        for ready, inputs in waiting:
            yield ready, inputs.result()


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


def embed_texts(
    model: Any, processor: Any, texts: Mapping[str, str], maximum: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the embeddings of texts batch by batch, in input order."""
    for batch in text_batches(texts, maximum):
        vectors = embed(model, processor.process_texts([texts[name] for name in batch]))
        yield dict(zip(batch, vectors, strict=True))


def embed_pages(
    model: Any, processor: Any, pages: Mapping[str, Page], visual_tokens: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the embeddings of pages batch by batch, in input order.

    Raises
    ------
    UserError
        If a page cannot be read.
    """
    opened = ((name, open_page(page)) for name, page in pages.items())
    batches = page_batches(opened, processor, visual_tokens)
    for batch, inputs in prepare_ahead(batches, processor):
        yield dict(zip(batch, embed(model, inputs), strict=True))


def embed_all(
    model: Any,
    processor: Any,
    queries: Mapping[str, str],
    pages: Mapping[str, Page],
    queries_per_batch: int,
    visual_tokens_per_batch: int,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Embed queries and pages and return float32 [tokens, embed_dim] of each, in input order.

    Raises
    ------
    UserError
        If a page cannot be read.
    """
    query_vectors: dict[str, torch.Tensor] = {}
    page_vectors: dict[str, torch.Tensor] = {}
    for batch in embed_texts(model, processor, queries, queries_per_batch):
        query_vectors.update(batch)
    for batch in embed_pages(model, processor, pages, visual_tokens_per_batch):
        page_vectors.update(batch)
    return query_vectors, page_vectors
