"""Stage `benchmark@<recipe>`: latency of queries and pages, original against quantized.

Both run through the serving runtime (`stages.colqwen3.serving`) in one process, on the same
inputs, in turns; so whatever slows the machine slows both. On a GPU that is plain torch, compiled,
and compiled within CUDA graphs; on a CPU plain torch, with dense weights for both. Only here are
there timings. What the runtime embeds is compared with what plain transformers does in the same
arithmetic.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stages.colqwen3.processing_colqwen3 import AUGMENTATION_TOKENS
from stages.compute import DTYPES, choose_device
from stages.dataset import read_queries
from stages.errors import run
from stages.files import write_json
from stages.lock import claim
from stages.manifest import find_inspected_model, read_manifest
from stages.pages import find_pages, open_page
from stages.params import BenchmarkParams, load_params
from stages.paths import CHECKPOINTS, SPEED_METRICS
from stages.progress import Progress

LIBRARIES = ("torch", "transformers", "triton", "humming-kernels")
MODES = {"cuda": ("eager", "compiled", "graphs"), "cpu": ("eager",)}
BEST = "best"
WARMUP_GRAPHS = 3  # a page batch is recorded the second time it is seen

Work = Callable[[], object]


def query_rows(ids: Sequence[torch.Tensor], tokens: int, count: int) -> list[torch.Tensor]:
    """Return `count` rows of `tokens` token ids, made of real queries.

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


def median_ms(
    works: Sequence[Work], device: torch.device, warmup: int, repeats: int
) -> list[float]:
    """Return the median milliseconds of each of several works, called in turns."""
    times: list[list[float]] = [[] for _ in works]
    for number in range(warmup + repeats):
        for work, taken in zip(works, times, strict=True):
            found = timed_ms(work, device)
            if number >= warmup:
                taken.append(found)
    return [statistics.median(taken) for taken in times]


def compare_times(times: dict[str, list[float]], items: int) -> dict[str, Any]:
    """Turn milliseconds by mode, original and quantized, into what is reported.

    Parameters
    ----------
    times
        Mode -> milliseconds of the original and of the quantized model.
    items
        Queries or pages in the batch.

    Returns
    -------
    dict
        Each mode with ``speedup``, the original's time by the quantized model's, and
        ``speedup_to_best``, the original's in its fastest mode instead; and ``best``: the fastest
        mode of each, with items per second.
    """
    best = [min(column) for column in zip(*times.values(), strict=True)]
    made: dict[str, Any] = {
        mode: {**_pair(*pair), "speedup_to_best": round(best[0] / pair[1], 3)}
        for mode, pair in times.items()
    }
    made[BEST] = {
        **_pair(*best),
        "original_per_second": round(1000 * items / best[0], 2),
        "quantized_per_second": round(1000 * items / best[1], 2),
    }
    return made


def _pair(original: float, quantized: float) -> dict[str, float]:
    return {
        "original_ms": round(original, 3),
        "quantized_ms": round(quantized, 3),
        "speedup": round(original / quantized, 3),
    }


def token_cosines(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the cosine of every token; rows of `found` may go on behind the last one."""
    pairs = zip(found, wanted, strict=True)
    return torch.cat(
        [
            torch.cosine_similarity(ours[: len(theirs)].double().cpu(), theirs.double(), dim=-1)
            for ours, theirs in pairs
        ]
    )


def least_cosine(runtime: Any, model: Any, queries: Any, pages: Any) -> dict[str, float]:
    """Return the least cosine of any token between a runtime and plain transformers."""
    from stages.embed import embed

    found = {}
    for kind, inputs, made in (
        ("query", queries, runtime.run_queries(runtime.token_ids(queries))),
        ("page", pages, runtime.run_pages(pages)),
    ):
        wanted = embed(model, inputs)
        found[kind] = round(float(token_cosines(made[: len(wanted)], wanted).min()), 6)
    return found


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


def release(device: torch.device) -> None:
    """Give memory that nothing refers to back to the GPU, and measure its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def serve_alone(
    folder: Path, device: torch.device, params: BenchmarkParams, queries: Any, pages: Any
) -> dict[str, Any]:
    """Serve all query sizes and one page with nothing else in memory.

    Returns
    -------
    dict
        ``memory``, and ``cosine`` with plain transformers.
    """
    from stages.colqwen3.loading import load_model
    from stages.colqwen3.serving import load_runtime

    dtype = DTYPES[params.dtype]
    release(device)
    runtime = load_runtime(folder, device, dtype)
    loaded = loaded_memory(device)
    rows = runtime.token_ids(queries)
    for count in params.query_batches:
        runtime.run_queries(query_rows(rows, params.query_tokens, count))
    for _ in range(WARMUP_GRAPHS):
        runtime.run_pages(pages)
    used = {**loaded, **memory(device)}
    agreement = least_cosine(runtime, load_model(folder, dtype, device), queries, pages)
    return {"memory": used, "cosine": agreement}


def time_both(
    runtimes: Sequence[Any],
    params: BenchmarkParams,
    rows: Sequence[torch.Tensor],
    images: Sequence[Image.Image],
    processor: Any,
) -> dict[str, Any]:
    """Time original and quantized in turns, in every mode and on every input."""
    device = runtimes[0].device
    inputs: dict[str, dict[int, list[Work]]] = {"query": {}, "page": {}}
    for count in params.query_batches:
        batch = query_rows(rows, params.query_tokens, count)
        inputs["query"][count] = [partial(runtime.run_queries, batch) for runtime in runtimes]
    page_tokens = 0
    for count in params.page_batches:
        pages = processor.process_images([images[i % len(images)] for i in range(count)])
        page_tokens = pages["input_ids"].shape[1]
        inputs["page"][count] = [partial(runtime.run_pages, pages) for runtime in runtimes]
    tokens = {"query": params.query_tokens, "page": page_tokens}
    times: dict[str, dict[int, dict[str, list[float]]]] = {
        kind: {count: {} for count in batches} for kind, batches in inputs.items()
    }
    modes = MODES[device.type]
    warmup = max(params.warmup, WARMUP_GRAPHS if device.type == "cuda" else 0)
    total = len(modes) * sum(map(len, inputs.values()))
    with Progress("timings", total) as progress:
        for mode in modes:
            for runtime in runtimes:
                runtime.use(mode)
            for kind, batches in inputs.items():
                for count, works in batches.items():
                    taken = median_ms(works, device, warmup, params.repeats)
                    if all(runtime.runs(mode) for runtime in runtimes):  # no slower way was taken
                        times[kind][count][mode] = taken
                    progress.advance()
    return {
        kind: {
            "tokens": tokens[kind],
            "batches": {
                str(count): compare_times(found, count) for count, found in batches.items()
            },
        }
        for kind, batches in times.items()
    }


def setting(device: torch.device, params: BenchmarkParams, runtime: Any) -> dict[str, Any]:
    """Return what the figures depend on beside the model."""
    cuda = device.type == "cuda"
    made: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "dtype": params.dtype,
        "kernel": runtime.kernel,
        "repeats": params.repeats,
    }
    for library in LIBRARIES:
        try:
            made[library.replace("-", "_")] = version(library)
        except PackageNotFoundError:
            continue
    return made


def main() -> None:
    """Write metrics/speed/<recipe>.json."""
    parser = argparse.ArgumentParser(prog="python -m stages.benchmark", description=__doc__)
    parser.add_argument("recipe", help="name of a recipe in params.yaml")
    name = parser.parse_args().recipe
    from stages.colqwen3.loading import load_processor
    from stages.colqwen3.serving import load_runtime

    params = load_params()
    params.recipe(name)
    claim(f"benchmark@{name}")
    how = params.benchmark
    source = find_inspected_model(params.model, read_manifest())
    processor = load_processor(
        source, params.model.max_num_visual_tokens, params.model.trust_remote_code
    )
    dataset = Path(params.evaluate.dataset)
    texts = list(read_queries(dataset / "queries.jsonl").values())[: max(how.query_batches)]
    pages = list(find_pages(dataset / "corpus").values())[: max(how.page_batches)]
    images = [open_page(page) for page in pages]
    queries, page = processor.process_texts(texts), processor.process_images(images[:1])
    device = choose_device(params.compute.device)
    folders = {"original": source, "quantized": CHECKPOINTS / name}
    alone = {
        role: serve_alone(folder, device, how, queries, page) for role, folder in folders.items()
    }
    release(device)
    runtimes = [load_runtime(folder, device, DTYPES[how.dtype]) for folder in folders.values()]
    rows = runtimes[0].token_ids(queries)
    result = time_both(runtimes, how, rows, images, processor)
    result["alone"] = alone
    result["setting"] = setting(device, how, runtimes[1])
    write_json(SPEED_METRICS / f"{name}.json", result)


if __name__ == "__main__":
    run(main)
