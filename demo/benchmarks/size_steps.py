"""The measured parts of `demo.benchmarks.size` that are no stage: each runs as a child process.

Results go to stdout as a line that begins with ``RESULT``.
"""

import argparse
import hashlib
import json
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.headers import TensorInfo, read_header, weight_files
from demo.benchmarks.measure import RESULT

CHUNK = 16 << 20


def report(**values: Any) -> None:
    """Hand values to the parent process."""
    print(RESULT + json.dumps(rounded(values)), flush=True)


def rounded(value: Any) -> Any:
    """Return a JSON value with four significant digits to every fraction."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def reset_peak() -> None:
    """Start measuring the GPU's peak memory anew."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> dict[str, int]:
    """Return the peak memory of tensors, and of what torch holds of the GPU; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    return {
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
        "gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def read_all(folder: Path) -> int:
    """Read all weights of a model folder, and return how many bytes that were."""
    total, buffer = 0, bytearray(CHUNK)
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def floor(model: Path, out: Path, gigabytes: float) -> None:
    """Time reading the weights and writing a file, with no arithmetic between."""
    start = time.monotonic()
    read = read_all(model)
    middle = time.monotonic()
    chunk, left = os.urandom(CHUNK), int(gigabytes * 1e9)
    written = left
    with out.open("wb", buffering=0) as file:
        while left > 0:
            left -= file.write(chunk[:left])
    end = time.monotonic()
    out.unlink()
    report(
        read_bytes=read, read_seconds=middle - start,
        written_bytes=written, write_seconds=end - middle,
    )  # fmt: skip


def model_free(model: Path, out: Path) -> None:
    """Round to nearest by AutoRound's own model-free path."""
    from auto_round import AutoRound

    rounder = AutoRound(str(model), scheme="W4A16", iters=0, disable_opt_rtn=True)
    start = time.monotonic()
    rounder.quantize_and_save(str(out), format="auto_round")
    report(quantize_seconds=time.monotonic() - start)


def digest(folder: Path, tensor: TensorInfo) -> str:
    """Return the SHA-256 of the bytes of a stored tensor."""
    tensor_digest, left = hashlib.sha256(), tensor.nbytes
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        while left and (chunk := file.read(min(left, CHUNK))):
            tensor_digest.update(chunk)
            left -= len(chunk)
    return tensor_digest.hexdigest()


def stored(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of all safetensors files of a folder; AutoRound's index may misname them."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in read_header(path).items()}


def compare(first: Path, second: Path) -> None:
    """Count the tensors of two checkpoints that are equal byte for byte."""
    left, right = stored(first), stored(second)
    equal = [
        name
        for name in left.keys() & right.keys()
        if (left[name].dtype, left[name].shape) == (right[name].dtype, right[name].shape)
        and digest(first, left[name]) == digest(second, right[name])
    ]
    report(tensors=len(left.keys() | right.keys()), equal=len(equal))


def run_stage(module: str, words: list[str]) -> None:
    """Run a stage as ``python -m`` does, and report what it took of the GPU."""
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        report(**gpu_peak())


def peak_rates() -> None:
    """Measure what the GPU can do: bf16 matrix products and copies."""
    device = torch.device("cuda:0")
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    block = torch.empty(1 << 31, device=device, dtype=torch.uint8)
    other = torch.empty_like(block)
    product = seconds_of(lambda: matrix @ matrix, 10)
    copied = seconds_of(lambda: other.copy_(block), 10)
    report(
        bf16_flops=2 * 8192**3 / product,
        memory_bytes_per_second=2 * block.numel() / copied,  # read and written
    )


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Return the median wall time of `work`, after one run to warm up."""
    taken = []
    for _ in range(times + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.monotonic() - start)
    return statistics.median(taken[1:])


def serve(model: Path, pages: Path) -> None:
    """Load a checkpoint into the serving runtime, and embed queries and a page with it."""
    from colqwen3.dataset.pages import find_pages, open_page
    from colqwen3.serving import load_runtime

    start = time.monotonic()
    runtime = load_runtime(model)
    files = sum(path.stat().st_size for path in weight_files(model))
    report(load_seconds=time.monotonic() - start, kernel=runtime.kernel, mode=runtime.mode)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        loaded = torch.cuda.memory_allocated()
        report(files_bytes=files, loaded_bytes=loaded, loaded_to_files=loaded / files)
    page = open_page(next(iter(find_pages(pages).values())))
    texts = ["total outlay by year"]
    report(
        query_seconds=seconds_of(lambda: runtime.embed_queries(texts), 20),
        page_seconds=seconds_of(lambda: runtime.embed_pages([page]), 5),
        **gpu_peak(),
    )


def embed(
    model: Path, pages: Path, queries: Path, count: int, budgets: list[int], dtype: str, cap: float
) -> None:
    """Embed as stage `embed` does: one query, many queries, pages by several token budgets.

    `cap` bounds the memory that torch may take of the GPU, in GiB; 0: no bound. A budget that does
    not fit is reported as such.
    """
    from colqwen3.dataset.beir import read_queries
    from colqwen3.dataset.pages import find_pages, open_page
    from colqwen3.embedding.embedder import embed_all
    from colqwen3.model.loading import load_model, load_processor
    from colqwen3.system.device import DTYPES, choose_device
    from stages.checking.params import Params
    from stages.pipeline.params import load_params

    params = load_params(Params)
    bounds = params.embed

    def embed(texts: Any, images: Any, budget: int = bounds.visual_tokens_per_batch) -> Any:
        return embed_all(loaded, processor, texts, images, bounds.queries_per_batch, budget)

    device = choose_device(params.compute.device)
    if cap and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / whole))
    start = time.monotonic()
    loaded = load_model(model, DTYPES[dtype], device)
    report(load_seconds=time.monotonic() - start, **renamed(gpu_peak(), "load_"))
    processor = load_processor(model, params.model.max_num_visual_tokens)
    texts = dict(islice(read_queries(queries).items(), count))
    images = dict(islice(find_pages(pages).items(), count))
    first = next(iter(images.values()))
    prepared = seconds_of(lambda: processor.process_images([open_page(first)]), 3)
    report(page_preparation_seconds=prepared)
    one = dict(islice(texts.items(), 1))
    reset_peak()
    repeats = 3 if count > 1 else 1
    taken = seconds_of(lambda: embed(one, {}), repeats)
    report(query_seconds=taken)
    if count > 1:
        taken = seconds_of(lambda: embed(texts, {}), 1)
        report(queries_per_second=len(texts) / taken)
    report(**renamed(gpu_peak(), "queries_"))
    runs = []
    for budget in budgets:
        reset_peak()
        run: dict[str, Any] = {"visual_tokens_per_batch": budget, "pages": len(images)}
        start = time.monotonic()
        try:
            if device.type == "cuda":  # the first batch compiles and fills caches
                embed({}, dict(islice(images.items(), 1)), budget)
                start = time.monotonic()
            _, vectors = embed({}, images, budget)
            run["seconds"] = time.monotonic() - start
            run["pages_per_second"] = len(images) / run["seconds"]
            run["tokens_per_page"] = sum(len(item) for item in vectors.values()) / len(vectors)
            run["finite"] = all(bool(item.isfinite().all()) for item in vectors.values())
        except torch.cuda.OutOfMemoryError:
            run["out_of_memory"] = True
            torch.cuda.empty_cache()
        runs.append({**run, **gpu_peak()})
    report(budgets=runs)


def renamed(values: dict[str, int], prefix: str) -> dict[str, int]:
    """Return `values` with a prefix to their names."""
    return {prefix + name: value for name, value in values.items()}


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.benchmarks.size_steps", description=__doc__
    )
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("floor")
    part.add_argument("model", type=Path)
    part.add_argument("out", type=Path)
    part.add_argument("gigabytes", type=float)
    part = parts.add_parser("model_free")
    part.add_argument("model", type=Path)
    part.add_argument("out", type=Path)
    part = parts.add_parser("compare")
    part.add_argument("first", type=Path)
    part.add_argument("second", type=Path)
    part = parts.add_parser("run_stage")
    part.add_argument("module")
    part.add_argument("words", nargs="*")
    parts.add_parser("peak_rates")
    part = parts.add_parser("serve")
    part.add_argument("model", type=Path)
    part.add_argument("pages", type=Path)
    part = parts.add_parser("embed")
    part.add_argument("--model", type=Path)
    part.add_argument("--pages", type=Path)
    part.add_argument("--queries", type=Path)
    part.add_argument("--count", type=int)
    part.add_argument("--budgets", type=int, nargs="+")
    part.add_argument("--dtype")
    part.add_argument("--cap", type=float)
    values = vars(parser.parse_args())
    globals()[values.pop("part")](**values)


if __name__ == "__main__":  # AutoRound starts processes that import this module
    main()
