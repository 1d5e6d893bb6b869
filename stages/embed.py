"""Stages `embed_original` and `embed@<recipe>`: one vector a token for every query and page.

Also a command for users: ``--model``, ``--queries``, ``--pages`` and ``--out`` embed any data with
any ColQwen3 folder, original or quantized.
"""

import argparse
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stages.checkpoint import find_model, fingerprint, model_files
from stages.compute import DTYPES, choose_device, make_deterministic
from stages.dataset import read_queries
from stages.embeddings import write_embeddings
from stages.errors import PipelineError, run
from stages.lock import claim
from stages.manifest import find_inspected_model, read_manifest
from stages.pages import Page, find_pages, open_page
from stages.params import Params, load_params
from stages.parts import Parts
from stages.paths import CHECKPOINTS, EMBEDDINGS, SCRATCH
from stages.progress import Progress
from stages.scratch import Scratch, digest_file, surroundings, work_key
from stages.space import check_space

logger = logging.getLogger(__name__)

ORIGINAL = "original"
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "pypdfium2")
# around the visual tokens of a page, and behind the text of a query
PAGE_PROMPT_TOKENS, QUERY_SUFFIX_TOKENS = 11, 10
FLOAT32_BYTES = 4
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
    """Return how many visual tokens the processor makes of a page; `name` is for the error.

    Raises
    ------
    PipelineError
        If the page is more than 200 times as long as wide.
    """
    images = processor.image_processor
    limits = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
    try:
        patches = images.get_number_of_image_patches(image.height, image.width, limits)
    except ValueError as error:
        raise PipelineError(
            f"{getattr(image, 'filename', '') or f'page {name!r}'}: {error}; crop the page"
        ) from None
    return int(patches) // int(images.merge_size) ** 2


def prepare_ahead(
    batches: Iterable[tuple[list[str], list[Image.Image]]], processor: Any
) -> Iterator[tuple[list[str], Any]]:
    """Yield names and model inputs of each batch in order, the next `AHEAD` made meanwhile."""
    with ThreadPoolExecutor(AHEAD) as threads:
        waiting: deque[tuple[list[str], Any]] = deque()
        for names, images in batches:
            waiting.append((names, threads.submit(processor.process_images, images)))
            if len(waiting) > AHEAD:
                made, inputs = waiting.popleft()
                yield made, inputs.result()
        for made, inputs in waiting:
            yield made, inputs.result()


@torch.inference_mode()
def embed(model: Any, inputs: Any) -> list[torch.Tensor]:
    """Embed one batch; return a float32 [tokens, embed_dim] tensor an item, without padding."""
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    embeddings = model(**inputs).embeddings.float().cpu()
    mask = inputs["attention_mask"].bool().cpu()
    return [vectors[kept] for vectors, kept in zip(embeddings, mask, strict=True)]


def text_batches(texts: Mapping[str, str], most: int) -> Iterator[list[str]]:
    """Yield names in input order, `most` at a time; a long text goes alone.

    Every text of a batch is padded to its longest, and attention over 16 texts of ten thousand
    words would ask for a mask of gigabytes.
    """
    batch: list[str] = []
    for name, text in texts.items():
        long = len(text) > LONG_TEXT
        if batch and (long or len(batch) == most):
            yield batch
            batch = []
        batch.append(name)
        if long:
            yield batch
            batch = []
    if batch:
        yield batch


def embed_texts(
    model: Any, processor: Any, texts: Mapping[str, str], most: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the embeddings of texts batch by batch, in input order."""
    for batch in text_batches(texts, most):
        vectors = embed(model, processor.process_texts([texts[name] for name in batch]))
        yield dict(zip(batch, vectors, strict=True))


def embed_pages(
    model: Any, processor: Any, pages: Mapping[str, Page], visual_tokens: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the embeddings of pages batch by batch, in input order.

    Raises
    ------
    PipelineError
        If a page cannot be read.
    """
    opened = ((name, open_page(page)) for name, page in pages.items())
    batches = page_batches(opened, processor, visual_tokens)
    for batch, inputs in prepare_ahead(batches, processor):
        yield dict(zip(batch, embed(model, inputs), strict=True))


def embed_all(
    model: Any, processor: Any, queries: dict[str, str], pages: dict[str, Page], params: Params
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Embed queries and pages and return them all, in input order.

    Raises
    ------
    PipelineError
        If a page cannot be read.
    """
    bounds = params.embed
    made: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for batch in embed_texts(model, processor, queries, bounds.queries_per_batch):
        made[0].update(batch)
    for batch in embed_pages(model, processor, pages, bounds.visual_tokens_per_batch):
        made[1].update(batch)
    return made


def embed_into(
    scratch: Scratch,
    model: Any,
    processor: Any,
    queries: dict[str, str],
    pages: dict[str, Page],
    params: Params,
) -> Parts:
    """Embed into a scratch what it does not hold yet, a few items in memory at a time.

    Raises
    ------
    PipelineError
        If a page cannot be read.
    """
    parts, bounds = Parts(scratch), params.embed
    texts = {name: text for name, text in queries.items() if f"query/{name}" not in parts}
    images = {name: page for name, page in pages.items() if f"page/{name}" not in parts}
    done = len(queries) + len(pages) - len(texts) - len(images)
    if done:
        logger.info("going on: %d of %d are embedded", done, len(queries) + len(pages))
    with Progress("queries", len(texts)) as progress:
        for batch in embed_texts(model, processor, texts, bounds.queries_per_batch):
            parts.add("query", batch)
            progress.advance(len(batch))
    with Progress("pages", len(images)) as progress:
        for batch in embed_pages(model, processor, images, bounds.visual_tokens_per_batch):
            parts.add("page", batch)
            progress.advance(len(batch))
    parts.flush()
    return parts


def determinants(
    folder: Path,
    queries: Mapping[str, str],
    pages: Mapping[str, Page],
    params: Params,
    dtype: str,
    device: torch.device,
) -> dict[str, Any]:
    """Return everything that determines the embeddings, to the last bit, as a JSON value."""
    files = {page.path: "" for page in pages.values()}
    for path in files:
        files[path] = digest_file(path)
    return {
        "model": {path.name: fingerprint(path) for path in model_files(folder)},
        "queries": list(queries.items()),
        "pages": [(name, files[page.path], page.number) for name, page in pages.items()],
        "params": [dtype, params.model.model_dump(exclude={"source"}), params.embed.model_dump()],
        **surroundings(device, LIBRARIES),
    }


def most_bytes(queries: Mapping[str, str], pages: Sized, visual_tokens: int, width: int) -> int:
    """Return what the embeddings take at most, without tokenizing or opening anything.

    Parameters
    ----------
    queries
        Texts by name. A byte-level tokenizer makes at most one token of a byte.
    pages
        Their number counts.
    visual_tokens
        Most that a page may have.
    width
        Numbers a token, float32 each.
    """
    tokens = sum(len(text.encode()) + QUERY_SUFFIX_TOKENS for text in queries.values())
    tokens += len(pages) * (visual_tokens + PAGE_PROMPT_TOKENS)
    return tokens * width * FLOAT32_BYTES


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; exactly one of stage name and ``--model`` must be given."""
    parser = argparse.ArgumentParser(prog="python -m stages.embed", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"stage: {ORIGINAL!r} or a recipe of params.yaml")
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", help="embed with this model instead")
    parser.add_argument("--revision", help="commit of a Hub id")
    parser.add_argument(
        "--queries", type=Path, metavar="FILE.jsonl", help='lines of {"_id", "text"}'
    )
    parser.add_argument("--pages", type=Path, metavar="DIR", help="folder of page images or PDFs")
    parser.add_argument("--out", type=Path, metavar="FILE.safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="default: embed.dtype of params.yaml")
    args = parser.parse_args()
    if (args.name is None) == (args.model is None):
        parser.error(f"give either a stage name ({ORIGINAL!r} or a recipe) or --model")
    if args.name and (args.queries or args.pages or args.out or args.revision or args.dtype):
        parser.error("a stage takes its files from params.yaml; the options go with --model")
    if args.out and (args.out.suffix != ".safetensors" or args.out.is_dir()):
        parser.error("--out must name a file that ends in .safetensors")
    if args.model and (args.out is None or (args.queries is None and args.pages is None)):
        parser.error("--model needs --out and at least one of --queries and --pages")
    return args


def main() -> None:
    """Embed the evaluation set for a stage, or the given files."""
    from stages.colqwen3.loading import load_model, load_processor

    args = parse_arguments()
    params = load_params()
    trust = params.model.trust_remote_code
    if args.model:
        folder = find_model(args.model, args.revision, trust)
        query_file, page_folder, out = args.queries, args.pages, args.out
    else:
        dataset = Path(params.evaluate.dataset)
        query_file, page_folder = dataset / "queries.jsonl", dataset / "corpus"
        out = EMBEDDINGS / f"{args.name}.safetensors"
        if args.name != ORIGINAL:
            params.recipe(args.name)
        claim(f"embed@{args.name}")
        if args.name == ORIGINAL:
            folder = find_inspected_model(params.model, read_manifest())
        else:
            folder = CHECKPOINTS / args.name
    queries = read_queries(query_file) if query_file else {}
    pages = find_pages(page_folder) if page_folder else {}
    make_deterministic()
    device = choose_device(params.compute.device)
    processor = load_processor(folder, params.model.max_num_visual_tokens, trust)
    dtype = args.dtype or params.embed.dtype
    model = load_model(folder, DTYPES[dtype], device, trust)
    key = work_key(determinants(folder, queries, pages, params, dtype, device))
    needed = most_bytes(queries, pages, params.model.max_num_visual_tokens, model.config.embed_dim)
    # beside a file of the user's own; no recipe is called so
    work = SCRATCH / f"{args.name}.embed" if args.name else out.with_name(out.name + ".parts")
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    # as parts, and then as one file
    check_space(out.parent, max(0, 2 * needed - there), "the embeddings")
    with Scratch(work, key) as scratch:
        parts = embed_into(scratch, model, processor, queries, pages, params)
        write_embeddings(out, parts.of("query", queries), parts.of("page", pages))
        scratch.remove()


if __name__ == "__main__":
    run(main)
