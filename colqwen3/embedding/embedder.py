"""The one way to embed: texts and page files to vectors, by the fastest means of the machine.

On a GPU the serving runtime computes, worker processes prepare pages, and pages of one size go
together. On a CPU plain transformers compute, with dense weights and in input order.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from colqwen3.dataset.pages import Page
from colqwen3.dataset.patches import Cutter, PreparedPage
from colqwen3.embedding.batches import embed, like_size_batches, page_batches, text_batches
from colqwen3.embedding.preparing import prepare_pages
from colqwen3.system.device import ActivationsKind
from colqwen3.system.errors import UserError

Key = TypeVar("Key")
Group = TypeVar("Group")
Item = TypeVar("Item")
Prepared = PreparedPage | UserError
Numbered = tuple[tuple[int, Key], Item]
"""An item with the number of its group and its key there."""

GROUP = 64  # pages that form batches together where pages of one size do
IN_FLIGHT = 2  # batches that a GPU has to do or has done, before their vectors are waited for


class Embedder(Protocol):
    """What embeds batches.

    Attributes
    ----------
    processor
        That of the model.
    device
        Where it computes.
    name
        What computes, for what must know whether results can differ.
    groups_sizes
        Whether batches should be of pages of one size.
    """

    processor: Any
    device: torch.device
    name: str
    groups_sizes: bool

    @property
    def embed_dim(self) -> int:
        """Numbers per vector."""

    def embed_texts(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Embed one batch of texts; return [tokens, embed_dim] on the CPU for each."""

    def embed_batches(
        self, batches: Iterable[tuple[Key, Sequence[PreparedPage]]]
    ) -> Iterator[tuple[Key, list[torch.Tensor]]]:
        """Embed batches of pages in turn; yield [tokens, embed_dim] on the CPU for each page."""


class Plain:
    """A ColQwen3 of transformers.

    Parameters
    ----------
    model, processor
        From `load_model` and `load_processor`.
    output
        Dtype of the vectors.
    """

    name = "transformers"
    groups_sizes = False

    def __init__(self, model: Any, processor: Any, output: torch.dtype = torch.float32) -> None:
        self.model, self.processor, self.output = model, processor, output
        self.device: torch.device = model.device

    @property
    def embed_dim(self) -> int:
        """Numbers per vector."""
        return int(self.model.config.embed_dim)

    def embed_texts(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Embed one batch of texts; return [tokens, embed_dim] on the CPU for each."""
        vectors = embed(self.model, self.processor.process_texts(texts))
        return [item.to(self.output) for item in vectors]

    def embed_batches(
        self, batches: Iterable[tuple[Key, Sequence[PreparedPage]]]
    ) -> Iterator[tuple[Key, list[torch.Tensor]]]:
        """Embed batches of pages in turn; yield [tokens, embed_dim] on the CPU for each page."""
        for key, pages in batches:
            inputs = self.processor.page_prompts([page.grid for page in pages])
            patches = torch.from_numpy(_joined(pages)).to(self.device)
            inputs["pixel_values"] = self.processor.pixel_values(patches)
            yield key, [item.to(self.output) for item in embed(self.model, inputs)]


class OnRuntime:
    """A ColQwen3 of the serving runtime.

    While the GPU computes a batch, the next one is copied to it on a stream of its own, and the
    vectors of the one before are copied back.

    Parameters
    ----------
    runtime
        From `load_runtime`.
    output
        Dtype of the vectors, which the GPU casts to.
    """

    groups_sizes = True

    def __init__(self, runtime: Any, output: torch.dtype = torch.float32) -> None:
        self.runtime, self.processor, self.output = runtime, runtime.processor, output
        self.device: torch.device = runtime.device
        self.name = f"runtime, {runtime.kernel or 'dense'}, {runtime.activations} activations"
        self._on_gpu = self.device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(self.device) if self._on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def embed_dim(self) -> int:
        """Numbers per vector."""
        return int(self.runtime.embed_dim)

    def embed_texts(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Embed one batch of texts; return [tokens, embed_dim] on the CPU for each."""
        return [item.to("cpu", self.output) for item in self.runtime.embed_queries(texts)]

    def embed_batches(
        self, batches: Iterable[tuple[Key, Sequence[PreparedPage]]]
    ) -> Iterator[tuple[Key, list[torch.Tensor]]]:
        """Embed batches of pages in turn; yield [tokens, embed_dim] on the CPU for each page."""
        flying: deque[tuple[Key, _Flight]] = deque()
        for key, pages in batches:
            flying.append((key, self._start(pages)))
            if len(flying) >= IN_FLIGHT:
                first, flight = flying.popleft()
                yield first, flight.land()
        for first, flight in flying:
            yield first, flight.land()

    @torch.inference_mode()
    def _start(self, pages: Sequence[PreparedPage]) -> "_Flight":
        inputs = self.processor.page_prompts([page.grid for page in pages])
        lengths = inputs["attention_mask"].sum(-1).tolist()
        patches = torch.from_numpy(_joined(pages))
        if not self._on_gpu:
            inputs["patches"] = patches
            vectors = self.runtime.run_placed(self.runtime.place_pages(inputs))
            return _Flight(vectors.to(self.output), lengths, None, ())
        inputs["patches"] = patches.pin_memory()
        computing = torch.cuda.current_stream(self.device)
        # what is copied from here waits for the copies before it, and for no computation
        with torch.cuda.stream(self._copies):
            batch = self.runtime.place_pages(inputs)
        computing.wait_stream(self._copies)
        vectors = self.runtime.run_placed(batch).to(self.output)
        result = torch.empty(vectors.shape, dtype=self.output, pin_memory=True)
        result.copy_(vectors, non_blocking=True)
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(computing)
        # the batch is kept until the GPU has done with it: its memory is of the other stream
        return _Flight(result, lengths, done, (inputs, batch, vectors))


class _Flight(NamedTuple):
    """A batch on its way: vectors [pages, tokens, embed_dim] that are there once `done` is."""

    vectors: torch.Tensor
    lengths: list[int]
    done: Any
    kept: tuple[Any, ...]

    def land(self) -> list[torch.Tensor]:
        """Wait for the vectors; return those of each page without padding, which is on the right."""
        if self.done is not None:
            self.done.synchronize()
        pairs = zip(self.vectors, self.lengths, strict=True)
        # copies: a slice would keep the whole batch, and memory that stays pinned
        return [page[:length].clone() for page, length in pairs]


def load_embedder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    max_num_visual_tokens: int,
    trust_remote_code: bool = False,
    output: torch.dtype = torch.float32,
    activations: ActivationsKind | None = None,
) -> Embedder:
    """Load a model folder, original or quantized, to embed with: the runtime on a GPU.

    With `activations`, as of `load_runtime`, it is the runtime on a CPU too; int8 is then used for
    all batches of more than 64 tokens, so that times decide nothing.

    Raises
    ------
    UserError
        If the folder is damaged or no ColQwen3, or the activations do not work here.
    """
    if activations == "int8" and device.type == "cuda" and dtype != torch.bfloat16:
        raise UserError(
            "int8 activations need bfloat16 beside them on a GPU: give --dtype bfloat16, or embed.dtype: "
            "bfloat16 in params.yaml"
        )
    if device.type == "cuda" or activations:
        from colqwen3.serving.load import load_runtime

        runtime = load_runtime(
            folder, device, dtype, max_num_visual_tokens=max_num_visual_tokens,
            trust_remote_code=trust_remote_code, activations=activations or "bfloat16",
            time_activations=False,
        )  # fmt: skip
        if activations and runtime.activations != activations:
            raise UserError(
                f"{folder}: {activations} activations do not work on this machine, as a warning above "
                "says; embed without them"
            )
        return OnRuntime(runtime, output)
    from colqwen3.model.loading import load_model, load_processor

    processor = load_processor(folder, max_num_visual_tokens, trust_remote_code)
    return Plain(load_model(folder, dtype, device, trust_remote_code), processor, output)


def cutter(processor: Any) -> Cutter:
    """Return what cuts pages as a processor does."""
    images = processor.image_processor
    return Cutter(
        images.patch_size, images.merge_size,
        images.size["shortest_edge"], images.size["longest_edge"], int(images.resample),
    )  # fmt: skip


def embed_texts(
    embedder: Embedder, texts: Mapping[str, str], maximum: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the embeddings of texts batch by batch, in input order."""
    for batch in text_batches(texts, maximum):
        vectors = embedder.embed_texts([texts[name] for name in batch])
        yield dict(zip(batch, vectors, strict=True))


def embed_groups(
    embedder: Embedder,
    groups: Iterable[tuple[Group, Sequence[tuple[Key, Item]]]],
    visual_tokens: int,
    prepare: Callable[[Iterable[Numbered[Key, Item]]], Iterable[Numbered[Key, Prepared]]],
) -> Iterator[tuple[Group, dict[Key, torch.Tensor | UserError]]]:
    """Yield groups of pages as they are complete: each page's vectors, or why it has none.

    Pages are prepared ahead across groups, while batches lie within one: see `like_size_batches`.

    Parameters
    ----------
    embedder
        What embeds.
    groups
        Each with its pages, keys unique in it.
    visual_tokens
        Budget of a batch.
    prepare
        Turns pages into prepared ones in their order, each with the key that it came with; see
        `preparation`.
    """
    tokens = cutter(embedder.processor).visual_tokens
    order: deque[tuple[Group, list[Key]]] = deque()
    results: deque[dict[Key, torch.Tensor | UserError]] = deque()
    first = 0  # the number of the first group that is not complete

    def listed() -> Iterator[Numbered[Key, Item]]:
        for number, (group, pages) in enumerate(groups):
            order.append((group, [key for key, _ in pages]))
            results.append({})
            yield from (((number, key), page) for key, page in pages)

    def good() -> Iterator[tuple[int, Key, PreparedPage]]:
        for (number, key), page in prepare(listed()):
            if isinstance(page, UserError):
                results[number - first][key] = page
            else:
                yield number, key, page

    def complete() -> Iterator[tuple[Group, dict[Key, torch.Tensor | UserError]]]:
        nonlocal first
        while order and len(results[0]) == len(order[0][1]):
            group, keys = order.popleft()
            result = results.popleft()
            first += 1
            yield group, {key: result[key] for key in keys}

    batches = like_size_batches(good(), tokens, visual_tokens)
    for places, vectors in embedder.embed_batches(batches):
        for (number, key), page_vectors in zip(places, vectors, strict=True):
            results[number - first][key] = page_vectors
        yield from complete()
    yield from complete()


def preparation(embedder: Embedder, workers: int) -> Any:
    """Return what prepares page files for `embed_groups`; see `prepare_pages` about `workers`."""
    return functools.partial(prepare_pages, cutter=cutter(embedder.processor), workers=workers)


def embed_pages(
    embedder: Embedder, pages: Mapping[str, Page], visual_tokens: int, workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the embeddings of pages, some at a time, in input order.

    Raises
    ------
    UserError
        If a page cannot be read.
    """
    if embedder.groups_sizes:
        rest = iter(pages.items())
        groups = enumerate(iter(lambda: list(islice(rest, GROUP)), []))
        prepare = preparation(embedder, workers)
        for _, vectors in embed_groups(embedder, groups, visual_tokens, prepare):
            yield {name: _or_raise(item) for name, item in vectors.items()}
        return
    cut = cutter(embedder.processor)
    prepared = (
        (name, _or_raise(page)) for name, page in prepare_pages(pages.items(), cut, workers)
    )
    batches = page_batches(prepared, lambda page: cut.visual_tokens(page.grid), visual_tokens)
    for names, tensors in embedder.embed_batches(batches):
        yield dict(zip(names, tensors, strict=True))


Value = TypeVar("Value")


def _or_raise(value: Value | UserError) -> Value:
    if isinstance(value, UserError):
        raise value
    return value


def embed_all(
    model: Any,
    processor: Any,
    queries: Mapping[str, str],
    pages: Mapping[str, Page],
    queries_per_batch: int,
    visual_tokens_per_batch: int,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Embed queries and pages by plain transformers; return float32 [tokens, embed_dim] of each.

    Raises
    ------
    UserError
        If a page cannot be read.
    """
    embedder = Plain(model, processor)
    query_vectors: dict[str, torch.Tensor] = {}
    page_vectors: dict[str, torch.Tensor] = {}
    for batch in embed_texts(embedder, queries, queries_per_batch):
        query_vectors.update(batch)
    for batch in embed_pages(embedder, pages, visual_tokens_per_batch):
        page_vectors.update(batch)
    return query_vectors, page_vectors


def _joined(pages: Sequence[PreparedPage]) -> Any:
    """Return the patches of all pages in a row, [patches, channels x patch x patch]."""
    return np.concatenate([page.patches for page in pages])
