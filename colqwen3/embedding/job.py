"""Embedding a whole set of queries and pages into one file, resumed after a crash."""

import logging
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.fingerprint import fingerprint, model_files
from colqwen3.dataset.pages import Page
from colqwen3.embedding.embedder import Embedder, embed_pages, embed_texts, load_embedder
from colqwen3.embedding.parts import Parts
from colqwen3.embedding.preparing import default_workers
from colqwen3.embedding.store import write_embeddings
from colqwen3.system.device import DTYPES, ActivationsKind, choose_device, make_deterministic
from colqwen3.system.disk import check_space
from colqwen3.system.files import digest_file
from colqwen3.system.progress import Progress
from colqwen3.system.resume import Scratch, surroundings, work_key

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "pypdfium2")
# around the visual tokens of a page, and after the text of a query
PAGE_PROMPT_TOKENS, QUERY_SUFFIX_TOKENS = 11, 10
FLOAT32_BYTES = 4
OUTPUTS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EmbeddingOptions:
    """How a set is embedded.

    Attributes
    ----------
    dtype
        Of the arithmetic, a key of ``DTYPES``.
    output
        Of the embeddings: ``float32``, ``float16`` or ``bfloat16``.
    device
        ``auto``, ``cpu`` or ``cuda``.
    max_num_visual_tokens
        A page is shrunk until it has at most this many.
    queries_per_batch, visual_tokens_per_batch
        Bounds of a batch.
    trust_remote_code
        Whether Python files of the model folder may run (its tokenizer's).
    activations
        ``bfloat16`` or ``int8``: by the runtime, as it serves; None: by transformers on a CPU, and
        on a GPU by the runtime with 16-bit ones.
    workers
        Processes that prepare pages; None: as many as there are cores but one on a GPU, and none on
        a CPU, whose cores the model takes.
    """

    dtype: str = "float32"
    output: str = "float32"
    device: str = "auto"
    max_num_visual_tokens: int = 1280
    queries_per_batch: int = 16
    visual_tokens_per_batch: int = 1280
    trust_remote_code: bool = False
    activations: ActivationsKind | None = None
    workers: int | None = None


def embed_to_file(
    folder: Path,
    queries: dict[str, str],
    pages: dict[str, Page],
    out: Path,
    work: Path,
    options: EmbeddingOptions,
    code: str,
) -> None:
    """Embed queries and pages with a model folder, original or quantized, into `out`.

    Parameters
    ----------
    folder
        The model.
    queries, pages
        Texts and pages by name.
    out
        A safetensors file, see `write_embeddings`.
    work
        Folder for what is embedded so far; it is removed when `out` is complete.
    options
        How to embed.
    code
        A digest of the code; unfinished work of other code is not used.

    Raises
    ------
    UserError
        If the model cannot be loaded or a page cannot be read.
    DiskFullError
        If the disk has no room for the embeddings.
    """
    make_deterministic()
    device = choose_device(options.device)
    embedder = load_embedder(
        folder, DTYPES[options.dtype], device, options.max_num_visual_tokens,
        options.trust_remote_code, OUTPUTS[options.output], options.activations,
    )  # fmt: skip
    key = work_key(determinants(folder, queries, pages, options, embedder, code))
    needed = maximum_bytes(queries, pages, options.max_num_visual_tokens, embedder.embed_dim)
    scratch = Scratch(work, key)
    # as parts, and then as one file
    check_space(out.parent, max(0, 2 * needed - scratch.bytes()), "the embeddings")
    with scratch:
        parts = embed_into(scratch, embedder, queries, pages, options)
        stored = parts.of("query", queries), parts.of("page", pages)
        write_embeddings(
            out, *stored, dtype=OUTPUTS[options.output], activations=options.activations
        )
        scratch.remove()


def embed_into(
    scratch: Scratch,
    embedder: Embedder,
    queries: Mapping[str, str],
    pages: Mapping[str, Page],
    options: EmbeddingOptions,
) -> Parts:
    """Embed into a scratch what it does not hold yet, a few items in memory at a time.

    Raises
    ------
    UserError
        If a page cannot be read.
    """
    parts = Parts(scratch)
    texts = {name: text for name, text in queries.items() if f"query/{name}" not in parts}
    images = {name: page for name, page in pages.items() if f"page/{name}" not in parts}
    workers = options.workers
    if workers is None:
        workers = default_workers() if embedder.device.type == "cuda" else 0
    done = len(queries) + len(pages) - len(texts) - len(images)
    if done:
        logger.info("continuing: %d of %d are embedded", done, len(queries) + len(pages))
    with Progress("queries", len(texts)) as progress:
        for batch in embed_texts(embedder, texts, options.queries_per_batch):
            parts.add("query", batch)
            progress.advance(len(batch))
    with Progress("pages", len(images)) as progress:
        for batch in embed_pages(embedder, images, options.visual_tokens_per_batch, workers):
            parts.add("page", batch)
            progress.advance(len(batch))
    parts.flush()
    return parts


def determinants(
    folder: Path,
    queries: Mapping[str, str],
    pages: Mapping[str, Page],
    options: EmbeddingOptions,
    embedder: Embedder,
    code: str,
) -> dict[str, Any]:
    """Return everything that determines the embeddings, to the last bit, as a JSON value."""
    files = {page.path: "" for page in pages.values()}
    for path in files:
        files[path] = digest_file(path)
    return {
        "model": {path.name: fingerprint(path) for path in model_files(folder)},
        "queries": list(queries.items()),
        "pages": [(name, files[page.path], page.number) for name, page in pages.items()],
        "options": {key: value for key, value in asdict(options).items() if key != "workers"},
        "embedder": embedder.name,
        **surroundings(code, embedder.device, LIBRARIES),
    }


def maximum_bytes(queries: Mapping[str, str], pages: Sized, visual_tokens: int, width: int) -> int:
    """Return an upper bound of the bytes of the embeddings, without tokenizing or opening anything.

    Parameters
    ----------
    queries
        Texts by name. A byte-level tokenizer gives at most one token per byte.
    pages
        Their number counts.
    visual_tokens
        Maximum of a page.
    width
        Numbers per token, float32 each.
    """
    tokens = sum(len(text.encode()) + QUERY_SUFFIX_TOKENS for text in queries.values())
    tokens += len(pages) * (visual_tokens + PAGE_PROMPT_TOKENS)
    return tokens * width * FLOAT32_BYTES
