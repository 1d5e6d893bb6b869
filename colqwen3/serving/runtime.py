"""The serving runtime: queries and pages in, one unit vector per token out.

The arithmetic is that of `ColQwen3`, in a form that a GPU runs with few launches: linears that
read the same input are one, what lies between linears is one kernel, queries are padded to a few
sizes and each size is recorded once as a CUDA graph, so that the CPU only starts it.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from colqwen3.model.configuration_colqwen3 import ColQwen3Config
from colqwen3.model.processing_colqwen3 import ColQwen3Processor
from colqwen3.serving.decoder import Decoder
from colqwen3.serving.fused import PLAIN, Operations, choose_operations, int8_operations
from colqwen3.serving.recording import RecentlyUsed, Recorder, Recording, Work, agree
from colqwen3.serving.token_table import TokenTable, find_table, linears_apart
from colqwen3.serving.vision import Grid, Places, Tower
from colqwen3.serving.weights import Weights, build_decoder, build_tower
from colqwen3.system.device import ActivationsKind
from colqwen3.system.errors import first_line

logger = logging.getLogger(__name__)

Mode = Literal["eager", "compiled", "graphs"]

TOKEN_STEP = 2  # queries are padded to a multiple
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # and batches to one of these
MAXIMUM_TOKENS = 6000  # in a recorded forward; beyond, launches cost nothing beside the arithmetic
CACHED_PLACES = 64  # cosines and sines of text lengths, and of page sizes
RECORDED_QUERIES, RECORDED_PAGES = 128, 16  # sizes of batches that stay recorded
# of the trial, on average: random weights of the 4B's depth are off by some thousandths, and what is
# broken by far more
MINIMUM_INT8_COSINE = 0.98
MAXIMUM_INT8_ERROR = (
    0.1  # of any token or output of a linear, relative; 8 bits are off by 0.01 to 0.03
)
LONG = 256  # tokens from which cuDNN's attention is the faster one


@dataclass(frozen=True)
class PageBatch:
    """The pages of a batch, on the device.

    Attributes
    ----------
    ids
        Integers [pages, tokens], padded on the right.
    pixels
        [patches, channels x temporal patch x patch x patch].
    places
        What their sizes determine in the vision tower.
    visual
        Places of the visual tokens among all pages x tokens.
    cos, sin
        [pages x tokens, head_dim].
    """

    ids: torch.Tensor
    pixels: torch.Tensor
    places: Places
    visual: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class Runtime:
    """A ColQwen3 ready to serve, from `load_runtime`; for use by one thread.

    Attributes
    ----------
    processor
        That of the model.
    embed_dim
        Numbers per vector.
    device, dtype
        Where and in what it computes.
    kernel
        What computes the quantized linears, of `colqwen3.serving.linears.KERNELS`: several, joined
        by ``and``, where one is not right for all sizes.
    mode
        What really runs: ``graphs`` (forwards replayed from CUDA graphs), ``compiled`` or
        ``eager``; a slower one than was asked for where the faster does not work, as on a CPU.
    activations
        What the decoder's linears really take: ``bfloat16`` (those of `dtype`), or ``int8``: in 8
        bits wherever `token_table` says that it is faster.
    token_table
        Times of both kinds, with ``int8``.
    """

    def __init__(
        self,
        config: ColQwen3Config,
        processor: ColQwen3Processor,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        activations: ActivationsKind = "bfloat16",
        time_activations: bool = True,
    ) -> None:
        self._config, self.processor = config, processor
        self.embed_dim: int = config.embed_dim
        self._decoder: Decoder = build_decoder(weights, config)
        self._tower: Tower = build_tower(weights, config)
        self._embeddings = weights.embeddings()
        self._recorded_queries: RecentlyUsed[Recording] = RecentlyUsed(RECORDED_QUERIES)
        self._recorded_pages: RecentlyUsed[Recording | None] = RecentlyUsed(RECORDED_PAGES)
        self._recorder = Recorder(device) if device.type == "cuda" else None
        self._pad: int = processor.tokenizer.pad_token_id
        self.device, self.dtype, self.kernel = device, dtype, weights.kernel
        self._quantization = weights.quantization
        self.mode: Mode = "eager"
        self._wanted_activations: ActivationsKind = activations
        self._time_activations = time_activations
        self.activations: ActivationsKind = "bfloat16"
        self.token_table: TokenTable | None = None
        self._operations: Operations = PLAIN
        self._int8_operations: Operations | None = None
        # without a reference to the runtime, whose memory is freed with its last reference
        rotary = Qwen3VLTextRotaryEmbedding(config.text_config)
        cos_sin = functools.partial(_cos_sin, rotary, dtype, device)
        cached = functools.lru_cache(CACHED_PLACES)
        self._text_places = cached(functools.partial(_text_places, cos_sin))
        self._grid_places = cached(functools.partial(_grid_places, cos_sin, self._tower.merge))

    def use(self, mode: Mode) -> None:
        """Compute in another mode from here on.

        A short text and a small page are embedded by plain torch, and by fused kernels. When
        that fails or does not agree, a warning says so and plain torch is used. CUDA graphs are
        recorded of either.
        """
        self.mode, self._operations = "eager", PLAIN
        self.activations, self._int8_operations, self.token_table = "bfloat16", None, None
        self._forget_recordings()
        with self._at_home():
            expected = self._trial(PLAIN)
            if mode != "eager":
                self._operations = self._fused(expected)
            if self._wanted_activations == "int8":
                self._use_int8(expected)
        if mode != "eager":
            records = mode == "graphs" and self.device.type == "cuda"
            self.mode = "graphs" if records else self._unrecorded_mode()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the trials took

    def _fused(self, expected: tuple[torch.Tensor, torch.Tensor]) -> Operations:
        """Return the fastest operations that give the expected embeddings of the trial."""
        problem = "are wrong"
        try:
            operations = choose_operations(self.device)
            if operations is PLAIN or all(map(agree, self._trial(operations), expected)):
                return operations
        except Exception as error:  # a compiler can fail in many ways
            problem = f"fail ({first_line(error)})"
        logger.warning("fused kernels %s here: plain torch is used, and slower", problem)
        return PLAIN

    def _use_int8(self, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Compute in 8 bits where that is faster, if it gives about the embeddings of the trial."""
        try:
            operations = int8_operations(self._operations, self.device)
            pairs = zip(self._trial(operations), expected, strict=True)
            cosines = torch.stack([(actual * right).sum(-1).mean() for actual, right in pairs])
            cosine = float(cosines.min())  # NaN stays NaN
            off = linears_apart(self._decoder, self._operations, operations)
            if cosine >= MINIMUM_INT8_COSINE and off <= MAXIMUM_INT8_ERROR:
                self.token_table = self._find_table(operations)
                self._int8_operations, self.activations = operations, "int8"
                return
            problem = (
                f"give embeddings with a cosine of {cosine:.3f} to those of 16 bits, and linears that "
                f"are {off:.3f} off"
            )
        except Exception as error:  # a compiler or a driver can fail in many ways
            problem = f"fail ({first_line(error)})"
        logger.warning("8-bit activations %s here: 16-bit ones are used", problem)

    def _find_table(self, int8: Operations) -> TokenTable:
        if not self._time_activations or self._recorder is None:
            return TokenTable()
        fused = self._operations is not PLAIN
        key = [self.kernel, self._quantization, fused, self._config.text_config.to_dict()]
        return find_table(self._decoder, self._operations, int8, key, self._recorder.stream)

    def _operations_for(self, tokens: int) -> Operations:
        """Return what to compute a forward of so many tokens with."""
        table, int8 = self.token_table, self._int8_operations
        if table is not None and int8 is not None and table.int8_is_faster(tokens):
            return int8
        return self._operations

    def _unrecorded_mode(self) -> Mode:
        return "eager" if self._operations is PLAIN else "compiled"

    def runs(self, mode: Mode) -> bool:
        """Whether it computes in this mode, with fused kernels unless the mode is ``eager``."""
        return self.mode == mode and (mode == "eager" or self._operations is not PLAIN)

    def _at_home(self) -> contextlib.AbstractContextManager[object]:
        """Make the runtime's GPU the current one: kernels and graphs that name none are for it."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()

    @torch.inference_mode()
    def _trial(self, operations: Operations) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed a short text and a small page with `operations`, without recording anything."""
        page = self.processor.process_images([Image.linear_gradient("L")])
        batch, ids = self.place_pages(page), torch.arange(24, device=self.device)[None]
        text = self._queries(*self._text_places(24), ids, operations)
        return text, self._pages(batch, batch.pixels, operations)

    # ---- Queries -------------------------------------------------------------------------------

    def embed_queries(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Embed queries, or passages of text.

        Returns
        -------
        list
            Float32 [tokens, embed_dim] on the runtime's device for each text.

        Raises
        ------
        TypeError
            If it is given anything but a list of strings.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError("embed_queries takes a list of strings")
        embeddings: list[torch.Tensor] = []
        for start in range(0, len(texts), BATCHES[-1]):
            rows = self.token_ids(self.processor.process_texts(texts[start : start + BATCHES[-1]]))
            vectors = self.run_queries(rows)
            embeddings += [vectors[i, : len(row)] for i, row in enumerate(rows)]
        return embeddings

    def token_ids(self, inputs: Any) -> list[torch.Tensor]:
        """Return the token ids of each row of a processor's batch, without padding."""
        masks = inputs["attention_mask"].bool()
        return [ids[mask] for ids, mask in zip(inputs["input_ids"], masks, strict=True)]

    @torch.inference_mode()
    def run_queries(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embed rows of token ids without images, at most 64.

        Returns
        -------
        torch.Tensor
            Float32 [at least len(rows), at least the longest row, embed_dim].
        """
        with self._at_home():
            return self._run_queries(rows)

    def _run_queries(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        longest = max(map(len, rows))
        tokens = -(-longest // TOKEN_STEP) * TOKEN_STEP
        batch = next(size for size in BATCHES if size >= len(rows))
        if not self._records(batch * tokens):
            return self._unrecorded_queries(rows)
        ids = self._padded(rows, batch, tokens)
        recording = self._recorded_queries.get((batch, tokens))
        if recording is None:
            places = self._text_places(tokens)
            work = functools.partial(self._queries, *places)
            recording = self._record(work, ids.to(self.device), places)
            if recording is None:
                return self._unrecorded_queries(rows)
            self._recorded_queries.put((batch, tokens), recording)
        return recording.replay(ids)

    def _unrecorded_queries(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        tokens = max(map(len, rows))
        ids = self._padded(rows, len(rows), tokens)
        return self._queries(*self._text_places(tokens), ids.to(self.device))

    def _records(self, tokens: int) -> bool:
        return self.mode == "graphs" and tokens <= MAXIMUM_TOKENS

    def _padded(self, rows: Sequence[torch.Tensor], batch: int, tokens: int) -> torch.Tensor:
        ids = torch.full((batch, tokens), self._pad)
        filled = pad_sequence(list(rows), batch_first=True, padding_value=self._pad)
        ids[: len(rows), : filled.shape[1]] = filled
        return ids

    def _queries(
        self,
        cos: torch.Tensor,
        sin: torch.Tensor,
        ids: torch.Tensor,
        operations: Operations | None = None,
    ) -> torch.Tensor:
        batch, tokens = ids.shape
        operations = operations or self._operations_for(ids.numel())
        cos, sin = cos.repeat(batch, 1), sin.repeat(batch, 1)
        with _attention(tokens):
            hidden = self._embeddings(ids)
            return self._decoder.run(hidden, cos, sin, operations)

    def _record(self, work: Work, inputs: torch.Tensor, tensors: object) -> Recording | None:
        """Record `work`; if that fails, warn, and record nothing any more."""
        try:
            assert self._recorder is not None, "only a GPU records"
            return self._recorder.record(work, inputs, tensors)
        except Exception as error:  # torch, a kernel library or the driver
            reason = first_line(error)
            logger.warning("CUDA graphs do not work here (%s): serving is slower", reason)
            self.mode = self._unrecorded_mode()
        self._forget_recordings()  # what they hold may be what is missing
        return None

    def _forget_recordings(self) -> None:
        self._recorded_queries.clear()
        self._recorded_pages.clear()
        if self._recorder is not None:
            self._recorder.free()

    # ---- Pages ---------------------------------------------------------------------------------

    def embed_pages(self, pages: Sequence[Image.Image]) -> list[torch.Tensor]:
        """Embed page images, all in one batch.

        Returns
        -------
        list
            Float32 [tokens, embed_dim] on the runtime's device for each page.

        Raises
        ------
        TypeError
            If it is given anything but a list of PIL images.
        ValueError
            If a page has no pixels, or is more than 200 times as long as wide.
        """
        if isinstance(pages, Image.Image) or not all(isinstance(p, Image.Image) for p in pages):
            raise TypeError("embed_pages takes a list of PIL images")
        if not pages:
            return []
        inputs = self.processor.cut_pages(pages)
        vectors = self.run_pages(inputs)
        rows = self.token_ids(inputs)
        return [vectors[i, : len(row)] for i, row in enumerate(rows)]

    def run_pages(self, inputs: Any) -> torch.Tensor:
        """Embed the pages of one batch of the processor.

        Returns
        -------
        torch.Tensor
            Float32 [pages, tokens of the longest, embed_dim].
        """
        return self.run_placed(self.place_pages(inputs))

    @torch.inference_mode()
    def run_placed(self, batch: PageBatch) -> torch.Tensor:
        """Embed the pages of one batch that is on the device, see `run_pages`."""
        with self._at_home():
            return self._run_placed(batch)

    def _run_placed(self, batch: PageBatch) -> torch.Tensor:
        if not self._records(batch.ids.numel()):
            return self._pages(batch, batch.pixels)
        # the prompt of a page is always the same, so its grid determines all but the pixels
        key = tuple(batch.places.runs)
        recording, work = self._recorded_pages.get(key), functools.partial(self._pages, batch)
        if recording is None and key in self._recorded_pages:  # the second batch of this kind
            recording = self._record(work, batch.pixels, batch)
        self._recorded_pages.put(key, recording)
        if recording:
            return recording.replay(batch.pixels)
        if self._recorder is None or self.mode != "graphs":  # no GPU, or recording has just failed
            return work(batch.pixels)
        return self._recorder.run(work, batch.pixels)

    @torch.inference_mode()
    def place_pages(self, inputs: Any) -> PageBatch:
        """Copy one batch to the device.

        Parameters
        ----------
        inputs
            What the processor makes of pages, by `cut_pages` or `process_images`.
        """
        grids: list[Grid] = [(t, h, w) for t, h, w in inputs["image_grid_thw"].tolist()]
        rows = self.token_ids(inputs)
        tokens = max(map(len, rows))
        ids = self._padded(rows, len(rows), tokens)
        places = [
            self._page_places(row, grid, tokens) for row, grid in zip(rows, grids, strict=True)
        ]
        cos, sin = (torch.cat(part) for part in zip(*places, strict=True))
        visual = (ids.flatten() == self._config.image_token_id).nonzero().flatten()
        if "patches" in inputs:
            patches = inputs["patches"].to(self.device, non_blocking=True)
            pixels = self.processor.pixel_values(patches)
        else:
            pixels = inputs["pixel_values"].to(self.device)
        return PageBatch(
            ids.to(self.device),
            pixels.to(self.dtype),
            self._tower.places(grids),
            visual.to(self.device),
            cos,
            sin,
        )

    def _pages(
        self, batch: PageBatch, pixels: torch.Tensor, operations: Operations | None = None
    ) -> torch.Tensor:
        operations = operations or self._operations_for(batch.ids.numel())
        with _attention(batch.ids.shape[1]):
            tokens, features = self._tower.run(pixels, batch.places, operations)
            hidden = self._embeddings(batch.ids)
            hidden.view(-1, hidden.shape[-1]).index_copy_(0, batch.visual, tokens)
            return self._decoder.run(
                hidden, batch.cos, batch.sin, operations, (batch.visual, features)
            )

    def _page_places(
        self, row: torch.Tensor, grid: Grid, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = int((row == self._config.image_token_id).nonzero()[0])
        return self._grid_places(grid, start, len(row), tokens)


CosSin = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _cos_sin(
    rotary: torch.nn.Module, dtype: torch.dtype, device: torch.device, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine [tokens, head_dim] of positions [3, tokens]."""
    cos, sin = rotary(torch.empty(0, dtype=dtype), positions.unsqueeze(1))
    return cos[0].to(device), sin[0].to(device)


def _text_places(cos_sin: CosSin, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return cos_sin(torch.arange(tokens).expand(3, -1))


def _grid_places(
    cos_sin: CosSin, merge: int, grid: Grid, start: int, length: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = page_positions(grid, merge, start, length)
    return cos_sin(functional.pad(positions, (0, tokens - length)))


def page_positions(grid: Grid, merge: int, start: int, length: int) -> torch.Tensor:
    """Return the M-RoPE positions of a page and the prompt around it.

    Text counts up in all three; a visual token is `start` plus its frame, row and column; the text
    after a page continues after its longer side (Qwen2-VL, arXiv:2409.12191).

    Parameters
    ----------
    grid
        Frames, patch rows, patch columns.
    merge
        Patches per side of a visual token.
    start
        Text tokens before the first visual one.
    length
        Of the whole prompt, visual tokens included.

    Returns
    -------
    torch.Tensor
        Integers [3, length].
    """
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    visual = torch.cartesian_prod(*map(torch.arange, (frames, rows, columns))).T + start
    after = torch.arange(length - start - visual.shape[1]) + start + max(rows, columns)
    return torch.cat([torch.arange(start).expand(3, -1), visual, after.expand(3, -1)], 1)


@contextlib.contextmanager
def _attention(tokens: int) -> Iterator[None]:
    """Prefer the attention that is the faster one for sequences of this length."""
    long = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    order = long if tokens >= LONG else long[::-1]
    with sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield
