"""Timing of serving runtimes against each other, in turns, and the memory that they take."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from colqwen3.model.processing_colqwen3 import AUGMENTATION_TOKENS
from colqwen3.system import device as device_memory

BEST, SUSTAINED = "best", "sustained"
SUSTAINED_MS = 500
WARMUP_GRAPHS = 3  # a page batch is recorded the second time it is seen

Work = Callable[[], object]


def query_rows(ids: Sequence[torch.Tensor], tokens: int, count: int) -> list[torch.Tensor]:
    """Return `count` rows of `tokens` token ids from real queries.

    Their text is cut or repeated; the augmentation tokens at the end stay.
    """
    rows = []
    for number in range(count):
        row = ids[number % len(ids)]
        text, suffix = row[:-AUGMENTATION_TOKENS], row[-AUGMENTATION_TOKENS:]
        length = tokens - AUGMENTATION_TOKENS
        rows.append(torch.cat([text.repeat(-(-length // len(text)))[:length], suffix]))
    return rows


def timed_ms(work: Work, device: torch.device) -> float:
    """Return the milliseconds of one call, by the GPU's own events where there is one."""
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def turn_order(count: int, turn: int) -> list[int]:
    """Return the order of one turn of a Williams design: 0, 1, -1, 2, -2 and so on from `turn`."""
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    return [(number + turn) % count for number in zigzag]


def median_ms(
    works: Sequence[Work], device: torch.device, warmup: int, repeats: int
) -> list[float]:
    """Return the median milliseconds of each of several works, called in turns.

    After a work that needs much power a GPU is slower for a while, so each turn has another order,
    in which each work follows every other equally often (a Williams design, when there are as many
    turns as works, an even number).
    """
    times: list[list[float]] = [[] for _ in works]
    for turn in range(warmup + repeats):
        for number in turn_order(len(works), turn):
            milliseconds = timed_ms(works[number], device)
            if turn >= warmup:
                times[number].append(milliseconds)
    return [statistics.median(taken) for taken in times]


def sustained_ms(
    works: Sequence[Work], single: Sequence[float], device: torch.device
) -> list[float]:
    """Return the milliseconds of each of several works, called again and again without a pause.

    So does a service under load, where a card may be slower or faster than for one call. One work
    after the other runs for about half a second, and is then timed for as long.

    Parameters
    ----------
    works
        Done one after another, not in turns.
    single
        About the milliseconds of one call of each.
    device
        Where they run.
    """
    times = []
    for work, milliseconds in zip(works, single, strict=True):
        count = 1 + int(SUSTAINED_MS / milliseconds)

        def block(work: Work = work, count: int = count) -> None:
            for _ in range(count):
                work()

        block()
        times.append(timed_ms(block, device) / count)
    return times


def compare_times(
    times: dict[str, list[float]], items: int, sustained: Sequence[float] = ()
) -> dict[str, Any]:
    """Turn milliseconds by mode, original and quantized, into what is reported.

    Parameters
    ----------
    times
        Mode -> milliseconds of the original and of the quantized model; then, if they were timed,
        of the same with 8-bit activations.
    items
        Queries or pages in the batch.
    sustained
        Milliseconds as of `sustained_ms`, if they were measured.

    Returns
    -------
    dict
        Each mode with ``speedup``, the original's time by the quantized model's, and
        ``speedup_to_best``, the original's in its fastest mode instead; and ``best``: the fastest
        mode of each, with items per second. With 8-bit activations ``speedup_int8`` and
        ``original_speedup_int8``: the time of the original with 16-bit ones by that. And
        ``sustained``, if given: times and ratios under a steady load.
    """
    best = [min(column) for column in zip(*times.values(), strict=True)]
    report: dict[str, Any] = {
        mode: {**_ratios(*columns), "speedup_to_best": round(best[0] / columns[1], 3)}
        for mode, columns in times.items()
    }
    report[BEST] = {
        **_ratios(*best),
        "original_per_second": round(1000 * items / best[0], 2),
        "quantized_per_second": round(1000 * items / best[1], 2),
    }
    if sustained:
        report[SUSTAINED] = _ratios(*sustained)
    return report


def _ratios(original: float, quantized: float, *in_int8: float) -> dict[str, float]:
    ratios = {
        "original_ms": round(original, 3),
        "quantized_ms": round(quantized, 3),
        "speedup": round(original / quantized, 3),
    }
    if in_int8:
        for name, taken in zip(("original_", ""), in_int8, strict=True):
            ratios[f"{name or 'quantized_'}int8_ms"] = round(taken, 3)
            ratios[f"{name}speedup_int8"] = round(original / taken, 3)
    return ratios


def token_cosines(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the cosine of every token; rows of `actual` may continue after the last one."""
    pairs = zip(actual, expected, strict=True)
    return torch.cat(
        [
            torch.cosine_similarity(ours[: len(theirs)].double().cpu(), theirs.double(), dim=-1)
            for ours, theirs in pairs
        ]
    )


def loaded_memory(device: torch.device) -> dict[str, int]:
    """Return what a runtime's tensors take of the GPU once it is loaded; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"gpu_loaded_bytes": torch.cuda.memory_allocated(device)}


def memory(device: torch.device) -> dict[str, int]:
    """Return the peak of what torch held of the GPU since it was last asked; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    return {"gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved(device)}


def free_memory(device: torch.device) -> None:
    """Free GPU memory that nothing refers to, and restart the measurement of its peak."""
    device_memory.free_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
