"""Whether a model's embeddings are the same bits in each run, and what it takes that they are.

    python -m demo.benchmarks.repeatability --model DIR --weights WORDS --out FILE.json

The runtime is loaded as it serves by default and with deterministic algorithms. Both embed the same
queries and pages again and again, and are timed in turns. Queries are recorded before they first run,
a few pages at their second, many never.
"""

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from colqwen3.serving import load_runtime
from colqwen3.serving.runtime import Runtime
from colqwen3.system.device import CUBLAS_WORKSPACE, DTYPES, make_deterministic
from colqwen3.system.errors import run
from colqwen3.system.files import write_json
from demo.benchmarks.measure import machine
from stages.evaluation.timing import WARMUP_GRAPHS, median_ms

QUERY_TOKENS = 26
BATCHES = {"queries": (1, 8, 64), "pages": (1, 2, 4, 8, 16)}
PAGE_PIXELS = (1024, 1280)
RUNS = 8

Embed = Callable[[], torch.Tensor]


def compare_runs(embed: Embed) -> dict[str, Any]:
    """Return how many numbers differ from those of the first run, at most, and by how much."""
    expected = embed()
    differing, largest = 0, 0.0
    for _ in range(RUNS):
        actual = embed()
        differing = max(differing, int((actual != expected).sum()))
        cosines = torch.cosine_similarity(actual.double(), expected.double(), dim=-1)
        largest = max(largest, 1 - float(cosines.min()))
    return {"numbers": expected.numel(), "differing": differing, "largest_1_minus_cosine": largest}


def measure(runtimes: dict[str, Runtime], kind: str, count: int) -> dict[str, Any]:
    """Return for each runtime how a batch's runs compare, and its time, the runtimes in turns."""
    first, *_ = runtimes.values()
    generator = torch.Generator().manual_seed(0)
    works: dict[str, Embed] = {}
    if kind == "queries":
        vocabulary = first.processor.tokenizer.vocab_size
        rows = [
            torch.randint(vocabulary, (QUERY_TOKENS,), generator=generator) for _ in range(count)
        ]
        works = {name: functools.partial(each.run_queries, rows) for name, each in runtimes.items()}
    else:
        page = Image.effect_noise(PAGE_PIXELS, 80).convert("RGB")
        inputs = first.processor.cut_pages([page] * count)
        works = {
            name: functools.partial(each.run_placed, each.place_pages(inputs))
            for name, each in runtimes.items()
        }
    runs = {name: compare_runs(work) for name, work in works.items()}
    warmup = WARMUP_GRAPHS if first.device.type == "cuda" else 0
    times = median_ms(list(works.values()), first.device, warmup, 8)
    return {
        name: {**found, "ms": round(taken, 3)}
        for (name, found), taken in zip(runs.items(), times, strict=True)
    }


def main() -> None:
    """Write the results after each batch."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.benchmarks.repeatability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", required=True, help="words for the results: whose they are")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    load = functools.partial(
        load_runtime, args.model, args.device, DTYPES["bfloat16" if gpu else "float32"]
    )
    os.environ.setdefault(*CUBLAS_WORKSPACE)  # which is read before make_deterministic is called
    runtimes = {"default": load()}  # before the other, which asks the whole process
    make_deterministic()
    runtimes["deterministic"] = load()
    results: dict[str, Any] = {
        "machine": machine(gpu), "weights": args.weights, "kernel": runtimes["default"].kernel,
        "runs": RUNS, "batches": {},
    }  # fmt: skip
    for kind, counts in BATCHES.items():
        for count in counts:
            results["batches"][f"{count} {kind}"] = measure(runtimes, kind, count)
            print(count, kind, results["batches"][f"{count} {kind}"], flush=True)
            write_json(args.out, results)


if __name__ == "__main__":
    run(main)
