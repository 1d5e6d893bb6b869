"""Which activations the decoder's linears are faster with, by the number of tokens: measured, and kept.

Products of int8 take two thirds of the time of 16-bit ones, and taking 4-bit weights to int8 before
takes the same time for one token as for thousands. From where on that pays depends on the card, the
shapes and the versions of what computes, so it is timed once for each.
"""

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from colqwen3.serving.decoder import Decoder, DecoderLayer
from colqwen3.serving.fused import Operations
from colqwen3.system.files import write_json

logger = logging.getLogger(__name__)

ALWAYS_16 = 64
"""Tokens up to which activations have 16 bits anywhere: a single query."""
SIZES = (128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096)
"""Tokens at which is measured."""
LAYERS = 4
"""Timed one after another, so that no cache holds their weights."""
REPLAYS = 7
LIBRARIES = ("torch", "triton", "humming-kernels")


@dataclass(frozen=True)
class TokenTable:
    """Microseconds of the linears of a decoder layer, with what makes their inputs.

    Attributes
    ----------
    tokens
        Rising.
    bfloat16, int8
        Microseconds with inputs of each kind, for each of `tokens`.
    """

    tokens: Sequence[int] = (ALWAYS_16,)
    bfloat16: Sequence[float] = (1.0,)
    int8: Sequence[float] = (0.0,)

    def int8_is_faster(self, tokens: int) -> bool:
        """Whether int8 is, at the next number of tokens that was measured, or at the largest."""
        if tokens <= ALWAYS_16:
            return False
        place = next((at for at, size in enumerate(self.tokens) if size >= tokens), -1)
        return self.int8[place] < self.bfloat16[place]


def find_table(decoder: Decoder, operations: Operations, int8: Operations, key: Any) -> TokenTable:
    """Return the table of this machine: kept, or measured and kept.

    On a CPU, which has no fast products of int8, all beyond `ALWAYS_16` tokens is said to be faster
    in 8 bits: there they are for judging what a GPU serves.

    Parameters
    ----------
    decoder
        Whose linears take both kinds of inputs.
    operations, int8
        What gives them.
    key
        What times depend on beside card and versions; JSON.
    """
    device = decoder.norm.device
    if device.type == "cpu":
        return TokenTable()
    versions = {name: metadata.version(name) for name in LIBRARIES}
    facts = [torch.cuda.get_device_name(device), versions, SIZES, key]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = cache_folder() / f"token-table-{digest}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return TokenTable(kept["tokens"], kept["bfloat16"], kept["int8"])
    except (OSError, ValueError, KeyError, TypeError):
        table = _measure(decoder, operations, int8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, vars(table))
    except OSError as error:
        logger.warning("%s: not kept, so it is measured at each start: %s", path, error)
    return table


def cache_folder() -> Path:
    """Return where tables are kept: the user's cache, see the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "colqwen3-autoround"


@torch.inference_mode()
def _measure(decoder: Decoder, operations: Operations, int8: Operations) -> TokenTable:
    taken: dict[str, list[float]] = {"bfloat16": [], "int8": []}
    for tokens in SIZES:
        for kind, chosen in (("bfloat16", operations), ("int8", int8)):
            taken[kind].append(_layer_microseconds(decoder, chosen, tokens))
    return TokenTable(SIZES, **taken)


def _layer_microseconds(decoder: Decoder, operations: Operations, tokens: int) -> float:
    """Return the median time of the linears of one layer on zeros, recorded as a CUDA graph."""
    layers, like = decoder.layers[:LAYERS], decoder.norm
    x = like.new_zeros(tokens, len(like))
    mixed = like.new_zeros(tokens, decoder.heads * decoder.head_dim)
    works = [_work(decoder, layer, operations, x, mixed) for layer in layers]
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    taken = []
    for _ in range(REPLAYS):
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return float(round(1000 * statistics.median(taken) / len(works), 1))


def _work(
    decoder: Decoder,
    layer: DecoderLayer,
    operations: Operations,
    x: torch.Tensor,
    mixed: torch.Tensor,
) -> Callable[[], None]:
    def work() -> None:
        _, h = operations.add_rms_norm(x, x, layer.input_norm, decoder.eps)
        layer.qkv(h)
        change = layer.o(operations.attended(mixed))
        _, h = operations.add_rms_norm(x, change, layer.post_attention_norm, decoder.eps)
        layer.down(operations.gate(layer.gate_up(h)))

    return work
