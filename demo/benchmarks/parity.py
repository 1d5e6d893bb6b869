"""Compares the embeddings of the serving runtime with those of plain transformers, token by token.

Both compute in 16 bit on a GPU, and two orders of the same 16-bit arithmetic do not agree to the
last bit; so each is also compared with transformers in float32 on the same (dequantized) weights,
and transformers with itself under another implementation of attention.
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages, open_page
from colqwen3.embedding.batches import embed
from colqwen3.model.loading import load_model, load_processor
from colqwen3.serving import load_runtime
from colqwen3.serving.runtime import Mode
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import write_json
from demo.benchmarks.measure import machine, open_results
from stages.evaluation.timing import WARMUP_GRAPHS, free_memory, token_cosines

QUERIES, PAGES = 16, 4
MODES: dict[str, tuple[Mode, ...]] = {"cuda": ("eager", "graphs"), "cpu": ("eager",)}

Embeddings = dict[str, list[torch.Tensor]]
"""``queries`` and ``pages`` -> float32 [tokens, embed_dim] on the CPU for each."""


def compare(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return least and mean cosine of a token; rows of `found` may go on behind the last token."""
    cosines = token_cosines(actual, expected)
    return {"least": round(float(cosines.min()), 6), "mean": round(float(cosines.mean()), 6)}


def by_runtime(
    folder: Path, device: torch.device, dtype: torch.dtype, inputs: dict[str, Any]
) -> tuple[str, dict[str, Embeddings]]:
    """Return the runtime's kernel, and its embeddings in each mode."""
    runtime = load_runtime(folder, device, dtype)
    result: dict[str, Embeddings] = {}
    for mode in MODES[device.type]:
        runtime.use(mode)
        rows = runtime.token_ids(inputs["queries"])
        queries = runtime.run_queries(rows)[: len(rows)]
        for _ in range(WARMUP_GRAPHS):
            pages = runtime.run_pages(inputs["pages"])
        if not runtime.runs(mode):
            raise UserError(f"{folder}: {mode} does not work here; the warning above says why")
        result[mode] = {"queries": list(queries.cpu()), "pages": list(pages.cpu())}
    return runtime.kernel, result


def by_transformers(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    inputs: dict[str, Any],
    attention: Sequence[str],
) -> list[Embeddings]:
    """Return the embeddings of plain transformers by each implementation of attention."""
    model = load_model(folder, dtype, device)
    result = []
    for implementation in attention:
        model.set_attn_implementation(implementation)
        result.append({kind: embed(model, batch) for kind, batch in inputs.items()})
    return result


def measure(
    folder: Path, dataset: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Compare the embeddings of some queries, one batch, and of some pages, another.

    Returns
    -------
    dict
        ``kernel``, ``tokens``, and for each pair that is compared ``queries`` and ``pages`` with
        least and mean cosine.
    """
    processor = load_processor(folder, 1280)
    texts = list(islice(read_queries(dataset / "queries.jsonl").values(), QUERIES))
    pages = [open_page(page) for page in islice(find_pages(dataset / "corpus").values(), PAGES)]
    inputs = {"queries": processor.process_texts(texts), "pages": processor.process_images(pages)}
    kernel, served = by_runtime(folder, device, dtype, inputs)
    free_memory(device)
    plain, other = by_transformers(folder, device, dtype, inputs, ("sdpa", "eager"))
    free_memory(device)
    (exact,) = by_transformers(folder, device, torch.float32, inputs, ("sdpa",))
    free_memory(device)
    pairs = {"transformers, sdpa / float32": (plain, exact)}
    pairs["transformers, sdpa / transformers, eager attention"] = (plain, other)
    for mode, result in served.items():
        pairs[f"runtime, {mode} / transformers, sdpa"] = (result, plain)
        pairs[f"runtime, {mode} / float32"] = (result, exact)
    return {
        "dataset": str(dataset),
        "kernel": kernel,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": {kind: sum(map(len, rows)) for kind, rows in exact.items()},
        "cosine": {
            name: {kind: compare(ours[kind], theirs[kind]) for kind in inputs}
            for name, (ours, theirs) in pairs.items()
        },
    }


def main() -> None:
    """Add the results of some folders to metrics/size/parity-<device>.json."""
    parser = argparse.ArgumentParser(prog="python -m demo.benchmarks.parity", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="what to compare")
    parser.add_argument("--dataset", type=Path, default=Path("demo/pages/evaluation"))
    parser.add_argument("--device", choices=MODES, default="cpu")
    parser.add_argument("--out", type=Path, help="default: metrics/size/parity-<device>.json")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in the patch embedding too
    out = args.out or Path(f"metrics/size/parity-{args.device}.json")
    results = open_results(out, {"machine": machine(gpu)}, "models")
    for model in args.models:
        name, separator, folder = model.partition("=")
        if not separator:
            raise UserError(f"{model!r} is no NAME=FOLDER")
        dtype = torch.bfloat16 if gpu else torch.float32
        results["models"][name] = measure(
            Path(folder), args.dataset, torch.device(args.device), dtype
        )
        write_json(out, results)
        for pair, kinds in results["models"][name]["cosine"].items():
            print(name, pair, kinds, flush=True)


if __name__ == "__main__":
    run(main)
