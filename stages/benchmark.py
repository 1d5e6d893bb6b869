"""Stage `benchmark@<recipe>`: latency of queries and pages, original against quantized.

Both run through the serving runtime (`colqwen3.serving`) in one process, on the same inputs, in turns;
so whatever slows the machine slows both. On a GPU that is with fused kernels, within CUDA graphs (also
called without a pause, one after the other) and without;
on a CPU plain torch, with dense weights for both. Only here are there timings. The runtime's
embeddings are compared with those of plain transformers in the same arithmetic.

Timings are no outs of DVC: they belong to the machine that made them, so they are neither
committed, pushed nor restored. The out says what was timed.
"""

import datetime
import logging
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages, open_page
from colqwen3.system.device import DTYPES, ActivationsKind, choose_device, device_name
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import write_json
from colqwen3.system.progress import Progress
from stages.evaluation.speed import checkpoint_digest, speed_file
from stages.evaluation.timing import (
    WARMUP_GRAPHS,
    Work,
    compare_times,
    free_memory,
    loaded_memory,
    median_ms,
    memory,
    query_rows,
    sustained_ms,
    token_cosines,
)
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import (
    BenchmarkParams,
    ComputeParams,
    EvaluateParams,
    ModelParams,
    Sections,
    load_params,
)
from stages.pipeline.paths import BENCHMARKS, CHECKPOINTS
from stages.pipeline.stage import claim, parse_recipe

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "triton", "humming-kernels")
MODES = {"cuda": ("graphs", "compiled"), "cpu": ("eager",)}


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    compute: ComputeParams
    evaluate: EvaluateParams
    benchmark: BenchmarkParams


def minimum_cosine(runtime: Any, model: Any, queries: Any, pages: Any) -> dict[str, float]:
    """Return the smallest cosine of any token between a runtime and plain transformers."""
    from colqwen3.embedding.batches import embed

    cosines = {}
    for kind, inputs, served in (
        ("query", queries, runtime.run_queries(runtime.token_ids(queries))),
        ("page", pages, runtime.run_pages(pages)),
    ):
        expected = embed(model, inputs)
        cosines[kind] = round(float(token_cosines(served[: len(expected)], expected).min()), 6)
    return cosines


def serve_alone(
    folder: Path,
    activations: ActivationsKind,
    device: torch.device,
    params: BenchmarkParams,
    queries: Any,
    pages: Any,
) -> dict[str, Any]:
    """Serve all query sizes and one page with nothing else in memory.

    Returns
    -------
    dict
        ``memory``, and ``cosine`` with plain transformers.
    """
    from colqwen3.model.loading import load_model

    free_memory(device)
    runtime = load(folder, activations, device, params)
    loaded = loaded_memory(device)
    rows = runtime.token_ids(queries)
    for count in params.query_batches:
        runtime.run_queries(query_rows(rows, params.query_tokens, count))
    for _ in range(WARMUP_GRAPHS):
        runtime.run_pages(pages)
    used = {**loaded, **memory(device)}
    agreement = minimum_cosine(runtime, load_model(folder, runtime.dtype, device), queries, pages)
    return {"memory": used, "cosine": agreement}


def load(
    folder: Path, activations: ActivationsKind, device: torch.device, params: BenchmarkParams
) -> Any:
    """Load a runtime that really computes with these activations.

    Raises
    ------
    UserError
        As of `check_activations`.
    """
    from colqwen3.serving import load_runtime

    runtime = load_runtime(folder, device, DTYPES[params.dtype], activations=activations)
    check_activations(runtime, activations)
    return runtime


def check_activations(runtime: Any, wanted: ActivationsKind) -> None:
    """Check that a runtime computes with the activations that are to be timed.

    Raises
    ------
    UserError
        If it does not.
    """
    if runtime.activations != wanted:
        raise UserError(
            f"{wanted} activations do not work on this machine, as a warning above says; set "
            "benchmark.int8_activations to false in params.yaml"
        )


def time_both(
    runtimes: Sequence[Any],
    params: BenchmarkParams,
    rows: Sequence[torch.Tensor],
    images: Sequence[Image.Image],
    processor: Any,
) -> dict[str, Any]:
    """Time all runtimes, original and quantized, in turns, in every mode and on every input.

    Raises
    ------
    UserError
        If there is no mode that all of them run in.
    """
    device = runtimes[0].device
    inputs: dict[str, dict[int, list[Work]]] = {"query": {}, "page": {}}
    for count in params.query_batches:
        batch = query_rows(rows, params.query_tokens, count)
        inputs["query"][count] = [partial(runtime.run_queries, batch) for runtime in runtimes]
    page_tokens = 0
    for count in params.page_batches:
        pages = processor.cut_pages([images[i % len(images)] for i in range(count)])
        page_tokens = pages["input_ids"].shape[1]
        inputs["page"][count] = [partial(runtime.run_pages, pages) for runtime in runtimes]
    tokens = {"query": params.query_tokens, "page": page_tokens}
    times: dict[str, dict[int, dict[str, list[float]]]] = {
        kind: {count: {} for count in batches} for kind, batches in inputs.items()
    }
    sustained: dict[str, dict[int, list[float]]] = {kind: {} for kind in inputs}
    modes = MODES[device.type]
    warmup = max(params.warmup, WARMUP_GRAPHS if device.type == "cuda" else 0)
    total = len(modes) * sum(map(len, inputs.values()))
    with Progress("timings", total) as progress:
        for mode in modes:
            for runtime in runtimes:
                wanted = runtime.activations
                runtime.use(mode)
                check_activations(runtime, wanted)
            for kind, batches in inputs.items():
                for count, works in batches.items():
                    taken = median_ms(works, device, warmup, params.repeats)
                    if all(runtime.runs(mode) for runtime in runtimes):  # no slower way was taken
                        times[kind][count][mode] = taken
                        said = ", ".join(f"{each:.2f}" for each in taken)
                        logger.info("%s, %s x %d: %s ms", mode, kind, count, said)
                        if mode == "graphs":
                            sustained[kind][count] = sustained_ms(works, taken, device)
                    progress.advance()
    if not all(by_mode for batches in times.values() for by_mode in batches.values()):
        raise UserError(
            f"original and quantized run together in none of the modes {', '.join(modes)} on this "
            "machine, as a warning above says: nothing can be timed"
        )
    return {
        kind: {
            "tokens": tokens[kind],
            "batches": {
                str(count): compare_times(by_mode, count, sustained[kind].get(count, ()))
                for count, by_mode in batches.items()
            },
        }
        for kind, batches in times.items()
    }


def setting(device: torch.device, params: BenchmarkParams, runtime: Any) -> dict[str, Any]:
    """Return what the figures depend on beside the model."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library.replace("-", "_")] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "dtype": params.dtype,
        "kernel": runtime.kernel,
        "token_table": runtime.token_table and vars(runtime.token_table),
        "repeats": params.repeats,
        **versions,
    }


def main() -> None:
    """Write artifacts/benchmark/<recipe>.json, and the timings beside DVC."""
    name = parse_recipe("benchmark", __doc__)
    from colqwen3.model.loading import load_processor

    params = load_params(Params)
    claim(f"benchmark@{name}")
    options = params.benchmark
    source = find_inspected_model(params.model, read_manifest())
    processor = load_processor(
        source, params.model.max_num_visual_tokens, params.model.trust_remote_code
    )
    dataset = Path(params.evaluate.dataset)
    texts = list(read_queries(dataset / "queries.jsonl").values())[: max(options.query_batches)]
    pages = list(find_pages(dataset / "corpus").values())[: max(options.page_batches)]
    images = [open_page(page) for page in pages]
    queries, page = processor.process_texts(texts), processor.process_images(images[:1])
    device = choose_device(params.compute.device)
    served: dict[str, tuple[Path, ActivationsKind]] = {
        "original": (source, "bfloat16"),
        "quantized": (CHECKPOINTS / name, "bfloat16"),
    }
    if options.int8_activations:
        served |= {f"{role}_int8": (folder, "int8") for role, (folder, _) in served.items()}
    alone = {
        role: serve_alone(*which, device, options, queries, page)
        for role, which in served.items()
        if role != "original_int8"  # which keeps its weights twice
    }
    free_memory(device)
    runtimes = [load(*which, device, options) for which in served.values()]
    rows = runtimes[0].token_ids(queries)
    times = time_both(runtimes, options, rows, images, processor)
    digest = checkpoint_digest(CHECKPOINTS / name)
    timings = {**times, "alone": alone, "setting": setting(device, options, runtimes[-1])}
    write_json(speed_file(name, digest), {"checkpoint": digest, **timings})
    timed = {"recipe": name, "checkpoint": digest, **options.model_dump()}
    write_json(BENCHMARKS / f"{name}.json", timed)


if __name__ == "__main__":
    run(main)
