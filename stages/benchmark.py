"""Stage `benchmark@<recipe>`: latency of one query and one page, original against quantized.

The quantized model runs as transformers users get it: `from_pretrained`, with the kernel that
auto-round picks for the device. One model is in memory at a time. Only here are there timings.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stages.compute import DTYPES, choose_device
from stages.dataset import read_queries
from stages.errors import run
from stages.files import write_json
from stages.lock import claim
from stages.manifest import find_inspected_model, read_manifest
from stages.pages import find_pages, open_page
from stages.params import BenchmarkParams, load_params
from stages.paths import CHECKPOINTS, SPEED_METRICS

LIBRARIES = ("torch", "transformers", "auto-round")


def median_ms(work: Callable[[], object], device: torch.device, warmup: int, repeats: int) -> float:
    """Return the median wall time of `work` in milliseconds, device queue drained."""
    times = []
    for number in range(warmup + repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warmup:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


@torch.inference_mode()
def time_model(model: Any, inputs: dict[str, Any], params: BenchmarkParams) -> dict[str, float]:
    """Return the median milliseconds of one forward for each named input."""
    device = model.device
    times = {}
    for name, batch in inputs.items():
        moved = {key: value.to(device) for key, value in batch.items()}

        def work(moved: dict[str, torch.Tensor] = moved) -> object:
            return model(**moved)

        times[name] = round(median_ms(work, device, params.warmup, params.repeats), 3)
    return times


def kernel_of(model: Any, linear: str) -> str:
    """Return the module and class that compute a quantized linear."""
    kind = type(model.get_submodule(linear))
    return f"{kind.__module__}.{kind.__qualname__}"


def main() -> None:
    """Write metrics/speed/<recipe>.json."""
    parser = argparse.ArgumentParser(prog="python -m stages.benchmark", description=__doc__)
    parser.add_argument("recipe", help="name of a recipe in params.yaml")
    name = parser.parse_args().recipe
    from stages.colqwen3.loading import load_model, load_packed, load_processor

    params = load_params()
    params.recipe(name)
    claim(f"benchmark@{name}")
    manifest = read_manifest()
    source = find_inspected_model(params.model, manifest)
    trust = params.model.trust_remote_code
    processor = load_processor(source, params.model.max_num_visual_tokens, trust)
    dataset = Path(params.evaluate.dataset)
    query = next(iter(read_queries(dataset / "queries.jsonl").values()))
    page = open_page(next(iter(find_pages(dataset / "corpus").values())))
    inputs = {"query": processor.process_texts([query]), "page": processor.process_images([page])}
    device = choose_device(params.compute.device)
    dtype = DTYPES[params.benchmark.dtype]
    original = load_model(source, dtype, device, trust)
    before = time_model(original, inputs, params.benchmark)
    del original
    gc.collect()
    quantized = load_packed(CHECKPOINTS / name, dtype, device, trust)
    after = time_model(quantized, inputs, params.benchmark)
    result: dict[str, Any] = {
        kind: {
            "tokens": inputs[kind]["input_ids"].shape[1],
            "original_ms": before[kind],
            "quantized_ms": after[kind],
            "speedup": round(before[kind] / after[kind], 3),
        }
        for kind in inputs
    }
    cuda = device.type == "cuda"
    result["setting"] = {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "original_dtype": params.benchmark.dtype,
        "quantized_dtype": str(quantized.dtype).removeprefix("torch."),
        "kernel": kernel_of(quantized, next(iter(manifest["linears"]))),
        "repeats": params.benchmark.repeats,
        **{library.replace("-", "_"): version(library) for library in LIBRARIES},
    }
    write_json(SPEED_METRICS / f"{name}.json", result)


if __name__ == "__main__":
    run(main)
