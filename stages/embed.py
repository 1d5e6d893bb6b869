"""Stages `embed_original` and `embed@<recipe>`: one vector a token for every query and page.

Also a command for users: ``--model``, ``--queries``, ``--pages`` and ``--out`` embed any data with
any ColQwen3 folder, original or quantized.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stages.checkpoint import find_model
from stages.compute import DTYPES, choose_device, make_deterministic
from stages.dataset import read_queries
from stages.embeddings import write_embeddings
from stages.errors import PipelineError, run
from stages.manifest import find_inspected_model, read_manifest
from stages.pages import Page, find_pages, open_page
from stages.params import Params, load_params
from stages.paths import CHECKPOINTS, EMBEDDINGS
from stages.progress import Progress
from stages.space import check_space

ORIGINAL = "original"
# around the visual tokens of a page, and behind the text of a query
PAGE_PROMPT_TOKENS, QUERY_SUFFIX_TOKENS = 11, 10
FLOAT32_BYTES = 4


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


@torch.inference_mode()
def embed(model: Any, inputs: Any) -> list[torch.Tensor]:
    """Embed one batch; return a float32 [tokens, embed_dim] tensor an item, without padding."""
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    embeddings = model(**inputs).embeddings.float().cpu()
    mask = inputs["attention_mask"].bool().cpu()
    return [vectors[kept] for vectors, kept in zip(embeddings, mask, strict=True)]


def embed_all(
    model: Any, processor: Any, queries: dict[str, str], pages: dict[str, Page], params: Params
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Embed all queries and pages, in input order.

    Raises
    ------
    PipelineError
        If a page cannot be read.
    """
    made_queries: dict[str, torch.Tensor] = {}
    names = list(queries)
    with Progress("queries", len(names)) as progress:
        for start in range(0, len(names), params.embed.queries_per_batch):
            batch = names[start : start + params.embed.queries_per_batch]
            vectors = embed(model, processor.process_texts([queries[name] for name in batch]))
            made_queries.update(zip(batch, vectors, strict=True))
            progress.advance(len(batch))
    made_pages: dict[str, torch.Tensor] = {}
    with Progress("pages", len(pages)) as progress:
        opened = ((name, open_page(page)) for name, page in pages.items())
        for batch, images in page_batches(opened, processor, params.embed.visual_tokens_per_batch):
            vectors = embed(model, processor.process_images(images))
            made_pages.update(zip(batch, vectors, strict=True))
            progress.advance(len(batch))
    return made_queries, made_pages


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
        if args.name == ORIGINAL:
            folder = find_inspected_model(params.model, read_manifest())
        else:
            params.recipe(args.name)
            folder = CHECKPOINTS / args.name
    queries = read_queries(query_file) if query_file else {}
    pages = find_pages(page_folder) if page_folder else {}
    make_deterministic()
    processor = load_processor(folder, params.model.max_num_visual_tokens, trust)
    dtype = DTYPES[args.dtype or params.embed.dtype]
    model = load_model(folder, dtype, choose_device(params.compute.device), trust)
    visual_tokens = params.model.max_num_visual_tokens
    needed = most_bytes(queries, pages, visual_tokens, model.config.embed_dim)
    check_space(out.parent, needed, "the embeddings")
    write_embeddings(out, *embed_all(model, processor, queries, pages, params))


if __name__ == "__main__":
    run(main)
