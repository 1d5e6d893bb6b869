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

from colqwen3.serving.decoder import Decoder, DecoderLayer, gated
from colqwen3.serving.fused import Operations
from colqwen3.serving.linears import Gated, local_error
from colqwen3.system.files import digest_file, write_json

logger = logging.getLogger(__name__)

ALWAYS_16 = 64
"""Tokens up to which activations have 16 bits anywhere: a single query."""
SIZES = (128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096)
"""Tokens at which is measured."""
LAYERS = 4
"""Timed one after another, so that no cache holds their weights."""
WARMUP, REPLAYS = 3, 7
TRIED_TOKENS = (65, 300, 1291)
CODE = (
    "int8.cu", "int8_kernels.py", "linears.py", "humming_tiles.py", "humming_gate.py",
    "humming_gate.cu", "gate_features.py", "fused.py", "early_kernels.py", "token_table.py",
)  # fmt: skip
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


def find_table(
    decoder: Decoder, operations: Operations, int8: Operations, key: Any, stream: Any
) -> TokenTable:
    """Return the table of this card: kept, or measured and kept.

    Parameters
    ----------
    decoder
        Whose linears take both kinds of inputs.
    operations, int8
        What gives them.
    key
        What times depend on beside card, versions and code; JSON.
    stream
        Of CUDA, on which it records what it measures.
    """
    device = decoder.norm.device
    code = [digest_file(Path(__file__).with_name(name)) for name in CODE]
    deterministic = torch.are_deterministic_algorithms_enabled()
    facts = [torch.cuda.get_device_name(device), _versions(), code, SIZES, deterministic, key]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = cache_folder() / f"token-table-{digest}.json"
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        table = _measure(decoder, operations, int8, stream)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, vars(table))
    except OSError as error:
        logger.warning("%s: not kept, so it is measured at each start: %s", path, error)
    return table


def _checked(kept: Any) -> TokenTable:
    """Return a table that was kept.

    Raises
    ------
    ValueError, KeyError, TypeError
        If it is damaged.
    """
    columns = [[float(value) for value in kept[key]] for key in ("tokens", "bfloat16", "int8")]
    if {len(column) for column in columns} != {len(SIZES)}:
        raise ValueError("columns are of other lengths")
    return TokenTable(kept["tokens"], *columns[1:])


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # builds of torch have it under other names
            found[name] = "unknown"
    return found


def cache_folder() -> Path:
    """Return where tables are kept: the user's cache, see the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "colqwen3-autoround"


@torch.inference_mode()
def _measure(decoder: Decoder, operations: Operations, int8: Operations, stream: Any) -> TokenTable:
    taken: dict[str, list[float]] = {"bfloat16": [], "int8": []}
    for tokens in SIZES:
        for kind, chosen in (("bfloat16", operations), ("int8", int8)):
            taken[kind].append(_layer_microseconds(decoder, chosen, tokens, stream))
    return TokenTable(SIZES, **taken)


def _layer_microseconds(
    decoder: Decoder, operations: Operations, tokens: int, stream: Any
) -> float:
    """Return the median time of the linears of one layer, recorded as a CUDA graph."""
    torch.cuda.empty_cache()  # what the last recording took
    inputs = _draw_inputs(decoder, tokens)
    works = [_work(decoder, layer, operations, *inputs) for layer in decoder.layers[:LAYERS]]
    for work in works:
        work()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what is cached here cannot be used while recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for work in works:
            work()
    for _ in range(WARMUP):
        graph.replay()
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


def _draw_inputs(decoder: Decoder, tokens: int) -> list[torch.Tensor]:
    """Return random inputs of `_work`, the same each time: two of a layer, and one of `o`."""
    source, hidden = torch.Generator().manual_seed(0), len(decoder.norm)
    widths = (hidden, hidden, decoder.heads * decoder.head_dim)
    return [torch.randn(tokens, width, generator=source).to(decoder.norm) for width in widths]


def _work(
    decoder: Decoder,
    layer: DecoderLayer,
    operations: Operations,
    x: torch.Tensor,
    change: torch.Tensor,
    mixed: torch.Tensor,
) -> Callable[[], list[Any]]:
    """Return what computes all that a layer does but attention; it gives what its linears do."""

    def work() -> list[Any]:
        _, h = operations.add_rms_norm(x, change, layer.input_norm, decoder.eps)
        qkv = layer.qkv(h)
        o = layer.o(operations.attended(mixed))
        _, h = operations.add_rms_norm(x, o, layer.post_attention_norm, decoder.eps)
        gate_up = layer.gate_up(h)
        return [qkv, o, gate_up, layer.down(gated(gate_up, operations))]

    return work


@torch.inference_mode()
def linears_apart(decoder: Decoder, operations: Operations, int8: Operations) -> float:
    """Return how far the linears of the first layer are apart in 8 and in 16 bits.

    Returns
    -------
    float
        The largest relative error of any token or output, on random inputs of sizes that fill tiles
        and that do not; NaN if there is one.
    """
    worst = []
    for tokens in TRIED_TOKENS:
        inputs = _draw_inputs(decoder, tokens)
        in_16, in_8 = (
            _work(decoder, decoder.layers[0], kind, *inputs)() for kind in (operations, int8)
        )
        for expected, actual in zip(in_16, in_8, strict=True):
            if isinstance(expected, Gated):
                expected, actual = expected.values, operations.gate(actual)
            # in place: a page's are the largest tensors there are
            worst.append(local_error(actual.sub_(expected), expected))
    return float(torch.stack(worst).max())
