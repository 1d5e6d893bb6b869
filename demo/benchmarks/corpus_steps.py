"""The steps of `demo.benchmarks.embed_corpus`."""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from colqwen3.corpus.job import (
    CorpusOptions,
    Part,
    Plan,
    Writer,
    embed_shards,
    find_missing,
    plan_corpus,
    start_manifest,
)
from colqwen3.corpus.sources import Source, find_sources
from colqwen3.dataset.pages import Page, open_page
from colqwen3.embedding.embedder import Embedder, OnRuntime, cutter
from colqwen3.embedding.preparing import default_workers, prepare_page
from colqwen3.serving import load_runtime
from colqwen3.system.device import choose_device, device_name
from colqwen3.system.errors import UserError, first_line
from colqwen3.system.files import write_json
from demo.benchmarks import drawn_pages
from demo.benchmarks.drawn_pages import PAGE, PDF_PAGES, write_pdf, write_png
from demo.benchmarks.measure import descendants, machine, memory

logger = logging.getLogger(__name__)

Result = dict[str, Any]


def draw_all(folder: Path, pages: int, distinct: int) -> Result:
    """Write `pages` files of `distinct` pages, and PDFs of the same; others are links to them."""
    png, pdf = folder / "png", folder / "pdf"
    png.mkdir(parents=True)
    pdf.mkdir()
    start = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        step = min(PDF_PAGES, distinct)
        waiting = [pool.submit(write_png, png, seed) for seed in range(distinct)]
        waiting += [pool.submit(write_pdf, pdf, first, step) for first in range(0, distinct, step)]
        for future in waiting:
            future.result()
    for number in range(distinct, pages):
        os.link(png / f"page-{number % distinct:06d}.png", png / f"page-{number:06d}.png")
    scans = sorted(pdf.iterdir())
    for number in range(len(scans), -(-pages // step)):
        os.link(scans[number % len(scans)], pdf / f"scan-{number * step:06d}.pdf")
    sizes = [path.stat().st_size for path in islice(png.iterdir(), distinct)]
    return {
        "seconds": round(time.monotonic() - start, 1),
        "pages": pages,
        "distinct": distinct,
        "pixels": list(PAGE),
        "png_bytes_per_page": sum(sizes) // len(sizes),
    }


def core_ms(work: Callable[[], object], repeats: int = 15) -> dict[str, float]:
    """Return minimum and median CPU milliseconds of this process for one call of `work`."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(1000 * (time.process_time() - start))
    return {"min": round(min(taken), 2), "median": round(sorted(taken)[repeats // 2], 2)}


def preparation(embedder: Embedder, png: list[Source], pdf: list[Source]) -> Result:
    """Return the milliseconds of one core for preparing a page, and for its parts."""
    cut = cutter(embedder.processor)
    page, scan = png[0].file_page, pdf[0].file_page
    folder = Path(tempfile.mkdtemp())
    grey, colour = folder / "grey.png", folder / "colour.png"
    open_page(page).convert("L").convert("RGB").save(grey)
    drawn_pages.scan().save(colour)
    image = open_page(page)
    width, height = cut.size(*image.size)
    resized = image.resize((width, height), Image.Resampling(cut.resample))
    return {
        "png": core_ms(lambda: prepare_page(cut, page)),
        "png_without_colour": core_ms(lambda: prepare_page(cut, Page(grey))),
        "png_of_photographs": core_ms(lambda: prepare_page(cut, Page(colour))),
        "pdf": core_ms(lambda: prepare_page(cut, scan)),
        "decode_png": core_ms(lambda: open_page(page)),
        "decode_png_of_photographs": core_ms(lambda: open_page(Page(colour))),
        "resize": core_ms(lambda: image.resize((width, height), Image.Resampling(cut.resample))),
        "resize_and_cut": core_ms(lambda: cut.cut(image)),
        "processor_float32": core_ms(lambda: embedder.processor.process_images([resized]), 5),
        "bytes_to_device": cut.cut(image).patches.nbytes,
    }


def runtime_alone(embedder: OnRuntime, png: list[Source], tokens: int, seconds: float) -> Result:
    """Return pages per second of the runtime on a batch that lies on the device already."""
    cut = cutter(embedder.processor)
    one = prepare_page(cut, png[0].file_page)
    count = max(1, tokens // cut.visual_tokens(one.grid))
    pages = [prepare_page(cut, page.file_page) for page in png[:count]]
    inputs = embedder.processor.page_prompts([page.grid for page in pages])
    inputs["patches"] = torch.cat([torch.from_numpy(page.patches) for page in pages])
    runtime = embedder.runtime
    batch = runtime.place_pages(inputs)
    first = runtime.run_placed(batch)
    for _ in range(3):  # recorded the second time
        again = runtime.run_placed(batch)
    _wait(embedder.device)
    rounds, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        runtime.run_placed(batch)
        _wait(embedder.device)
        rounds += 1
    taken = time.monotonic() - start
    return {
        "pages_per_batch": len(pages),
        "tokens_per_page": first.shape[1],
        "mode": runtime.mode,
        "kernel": runtime.kernel,
        "pages_per_second": round(len(pages) * rounds / taken, 3),
        "same_bits_recorded": bool(torch.equal(first, again)),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HostMemory:
    """The anonymous memory of this process and its workers, sampled while it is entered."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "HostMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            sizes = [memory(pid).get("RssAnon", 0) for pid in descendants(os.getpid())]
            self.samples.append(sum(sizes))
            if self._stop.wait(0.5):
                break

    def figures(self) -> Result:
        """Return the peak, and the means of the second and the last fifth: flat or growing."""
        sizes = self.samples
        fifth = max(1, len(sizes) // 5)
        parts = {"second_fifth": sizes[fifth : 2 * fifth] or sizes, "last_fifth": sizes[-fifth:]}
        gb = {name: round(sum(part) / len(part) / 1e9, 3) for name, part in parts.items()}
        return {"peak_gb": round(max(sizes) / 1e9, 3), **gb}


def end_to_end(plan: Plan, embedder: Embedder, device: torch.device) -> Result:
    """Embed a collection as the command does, model loaded before, and measure it."""
    plan.out.mkdir(parents=True)
    start_manifest(plan, device_name(device))
    missing = find_missing(plan, plan.shards)
    times, pages, errors = [], 0, 0
    with HostMemory() as host:
        start = time.monotonic()
        with Writer(plan) as writer:
            for shard, key, vectors in embed_shards(plan, embedder, missing, Part()):
                writer.add(shard, key, vectors)
                pages += len(shard.pages)
                errors += sum(isinstance(value, UserError) for value in vectors.values())
                times.append((time.monotonic() - start, pages))
        taken = time.monotonic() - start
    result = {
        "pages": pages,
        "errors": errors,
        "workers": plan.options.workers,
        "seconds": round(taken, 2),
        "pages_per_second": round(pages / taken, 3),
        "bytes_per_page": sum(path.stat().st_size for path in plan.out.glob("*.parquet")) // pages,
        "host_memory": host.figures(),
    }
    if len(times) > 2:  # without the start of the workers, and the first shard
        (first, before), (last, after) = times[0], times[-1]
        result["steady_pages_per_second"] = round((after - before) / (last - first), 3)
    return result


def launched(model: Path, inputs: Path, out: Path, cards: int) -> Result:
    """Run the command by ``accelerate launch``; the rate is that between each card's first and last files.

    There is none if a card has but one file.
    """
    words = ["-m", "accelerate.commands.launch", "--num_processes", str(cards)]
    words += ["--multi_gpu"] if cards > 1 else []
    words += [
        "-m",
        "colqwen3",
        "embed-corpus",
        "--model",
        str(model),
        "--out",
        str(out),
        str(inputs),
    ]
    start = time.monotonic()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [""])[-1][:300]}
    problems = [line for line in done.stderr.splitlines() if "WARNING" in line]
    times = [path.stat().st_mtime for path in sorted(out.glob("*.parquet"))]
    parts = [times[rank::cards] for rank in range(cards)]  # as the command deals shards out
    manifest = json.loads((out / "_manifest.json").read_text())
    figures: Result = {"seconds": round(time.monotonic() - start, 1), "warnings": problems[:4]}
    if any(len(part) < 2 or max(part) == min(part) for part in parts):
        return figures
    pages = manifest["embedded"] / len(times)
    rates = [pages * (len(part) - 1) / (max(part) - min(part)) for part in parts]
    return {
        **figures,
        "pages_per_second": round(sum(rates), 3),
        "of_each": [round(rate, 3) for rate in rates],
        "began_apart_seconds": round(max(map(min, parts)) - min(map(min, parts)), 1),
    }


def same_bytes(first: Path, second: Path) -> bool:
    """Whether the shards of one folder, one at least, are in another byte for byte."""
    files = sorted(path.name for path in first.glob("*.parquet"))
    return bool(files) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in files
    )


def main(description: str | None) -> None:
    """Measure, and write the results after every step; `description` is for ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.benchmarks.embed_corpus", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", default="random, true shapes", help="words for the results")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--pages", type=int, default=768)
    parser.add_argument("--distinct", type=int, default=128, help="pages that are really drawn")
    parser.add_argument("--format", default="float16")
    parser.add_argument("--tokens", type=int, default=5120, help="visual tokens of a batch")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing the runtime alone")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--only", default="draw,load,prepare,runtime,png,pdf,again", metavar="STEPS",
        help="steps with commas; gpus (accelerate launch) is one more (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    steps = args.only.split(",")
    device = choose_device(args.device)
    made_of = {"machine": machine(device.type == "cuda"), "weights": args.weights}
    results: Result = {**made_of, "steps": {}}
    work = Path(tempfile.mkdtemp(prefix="corpus-"))
    embedder: OnRuntime | None = None

    def step(name: str, action: Callable[[], Result]) -> None:
        if name not in steps:
            return
        logger.info("%s ...", name)
        try:
            results["steps"][name] = action()
        except Exception as error:  # what is measured already is worth keeping
            logger.exception("%s failed", name)
            results["steps"][name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        logger.info("%s: %s", name, results["steps"][name])
        write_json(args.out, results)

    def plan(inputs: Path, out: str) -> Plan:
        options = CorpusOptions(
            format=args.format, visual_tokens_per_batch=args.tokens, workers=args.workers
        )
        pages = find_sources([str(inputs)])[: args.pages]
        return plan_corpus(args.model, pages, work / out, options, device)

    def load() -> Result:
        nonlocal embedder
        start = time.monotonic()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        embedder = OnRuntime(load_runtime(args.model, device, dtype), torch.float16)
        return {"seconds": round(time.monotonic() - start, 1), "dtype": str(dtype).split(".")[1]}

    def loaded() -> OnRuntime:
        if embedder is None:
            raise UserError("the model is not loaded; add load to --only")
        return embedder

    def whole(kind: str, out: str) -> Result:
        result = end_to_end(plan(work / kind, out), loaded(), device)
        alone = results["steps"].get("runtime", {}).get("pages_per_second")
        if alone:
            for key in ("pages_per_second", "steady_pages_per_second"):
                if key in result:
                    result[f"{key.removesuffix('_pages_per_second')}_to_runtime"] = round(
                        result[key] / alone, 3
                    )
        return result

    def again() -> Result:
        """Embed the first shards anew, and compare bytes."""
        first = plan(work / "png", "png-again")
        some = replace(first, shards=first.shards[:3])
        end_to_end(some, loaded(), device)
        return {"shards": len(some.shards), "same_bytes": same_bytes(some.out, work / "png-out")}

    def gpus() -> Result:
        counts = range(1, min(2, torch.cuda.device_count()) + 1)
        outs = {n: work / f"gpus-{n}" for n in counts}
        result: Result = {
            str(n): launched(args.model, work / "png", out, n) for n, out in outs.items()
        }
        rates = [result[str(n)].get("pages_per_second") for n in counts]
        if len(rates) == 2 and all(rates):
            result["speedup"] = round(rates[1] / rates[0], 3)
            result["same_bytes"] = same_bytes(outs[1], outs[2])
        return result

    def pages_of(kind: str) -> list[Source]:
        return find_sources([str(work / kind)])

    try:
        step("draw", lambda: draw_all(work, args.pages, min(args.distinct, args.pages)))
        step("load", load)
        step("prepare", lambda: preparation(loaded(), pages_of("png"), pages_of("pdf")))
        step("runtime", lambda: runtime_alone(loaded(), pages_of("png"), args.tokens, args.seconds))
        step("png", lambda: whole("png", "png-out"))
        step("pdf", lambda: whole("pdf", "pdf-out"))
        step("again", again)
        embedder = None
        step("gpus", gpus)
    finally:
        with suppress(OSError):
            shutil.rmtree(work)
    print(json.dumps(results, indent=2))
