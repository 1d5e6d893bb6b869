"""Measures the pipeline at true size: time, memory and bytes of each stage, beside the floor.

The checkpoint has random weights of true shapes (`demo.benchmarks.true_size`); the stages are the pipeline's
own, run in working folders as DVC would run them. Every step is a child process; one that fails is
recorded as failed and the others go on. Results are merged into one JSON file a machine.

``--device cpu`` (the default) takes about ten minutes on two cores, ``--device cuda`` about twenty
on one H100.
"""

import argparse
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from ruamel.yaml import YAML

from colqwen3.checkpoint import layout
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_json
from demo.benchmarks.measure import Usage, machine, open_results, run_measured
from demo.benchmarks.operations import page_operations, tuning_operations

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
RESULTS = Path("metrics/size")
WEIGHTS = "random, true shapes"
PAGE_PIXELS = (1131, 1600)  # A4 at about 137 dpi: 1260 visual tokens
SAMPLES = 16  # of each kind
SAMPLES_PER_ITER = 8  # AutoRound's default
GPU_PAGES = 32
BUDGETS = [1280, 2560, 5120, 10240]
SPEED = {
    "dtype": "bfloat16", "repeats": 8,
    "query_tokens": 26, "query_batches": [1, 8, 64], "page_batches": [1, 4, 16],
    "int8_activations": True,
}  # fmt: skip
CAP_GIB = 11.25  # what a card of 12 GiB leaves to torch beside the driver's own
LOW_LAYERS = 4
END_TO_END_STEPS = 50
RTN, AUTOROUND = "rtn-w4g128", "w4g128"
SMALL: Mapping[str, Any] = {"token_embeddings": 8, "vision": {"attention": 8, "mergers": 8}}
EIGHT: Mapping[str, Any] = {"token_embeddings": 8, "vision": 8}
NOTHING: Mapping[str, Any] = {}

Result = dict[str, Any]


class StepError(Exception):
    """A step that failed, with the end of its output."""


@dataclass(frozen=True)
class Bench:
    """What is measured and where.

    Attributes
    ----------
    size
        Options of `demo.benchmarks.true_size` that choose the model.
    work
        Folder for everything that is written.
    device
        ``cpu`` or ``cuda``.
    model
        The checkpoint of random weights.
    """

    size: tuple[str, ...]
    work: Path
    device: str
    model: Path

    def call(self, name: str, *command: str | Path, folder: Path | None = None) -> Result:
        """Run ``python <command>`` measured, and return its figures."""
        return figures(self.measure(name, *command, folder=folder))

    def measure(
        self,
        name: str,
        *command: str | Path,
        folder: Path | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> Usage:
        """Run ``python <command>`` measured.

        Raises
        ------
        StepError
            If it fails.
        """
        log = self.work / f"{name}.log"
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",  # else what is printed comes after the error that ends it
            "TOKENIZERS_PARALLELISM": "false",
        }
        words = [sys.executable, *command]
        usage = run_measured(words, folder or ROOT, log, environment, enough)
        if usage.status and not (enough and enough()):
            raise StepError(f"exit status {usage.status}: {usage.output}")
        return usage

    def stage(self, name: str, folder: Path, *command: str) -> Result:
        """Run a stage in a working folder; on a GPU with its peak memory."""
        words = (
            ["-m", "demo.benchmarks.size_steps", "run_stage"] if self.device == "cuda" else ["-m"]
        )
        return self.call(name, *words, *command, folder=folder)

    def checkpoint(self, recipe: str) -> Path:
        """Return where a recipe's checkpoint lies."""
        return self.work / recipe_folder(recipe) / "artifacts/checkpoints" / recipe


def read_config(bench: Bench) -> dict[str, Any]:
    """Return the config of the checkpoint of random weights."""
    config: dict[str, Any] = read_json(bench.model / "config.json", "make it again")
    return config


def figures(usage: Usage) -> Result:
    """Return the figures of a finished child process."""
    return {
        "seconds": round(usage.seconds, 2),
        "peak_own_bytes": usage.peak_own_bytes,
        "peak_resident_bytes": usage.peak_resident_bytes,
        **usage.result,
    }


def recipe_folder(recipe: str) -> str:
    """Return the working folder of a recipe: every recipe has its own, so that none waits."""
    return f"run-{recipe}"


# ---- What is prepared --------------------------------------------------------------------------


def draw_pages(source: Path, count: int, folder: Path) -> None:
    """Write pages of A4 shape, the demo's enlarged, named ``page-000.png`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(source.iterdir())[:count]):
        with Image.open(path) as image:
            large = image.convert("RGB").resize(PAGE_PIXELS, Image.Resampling.LANCZOS)
        large.save(folder / f"page-{number:03d}.png")


def prepare_data(bench: Bench) -> tuple[Path, Path]:
    """Return datasets to tune on and to embed, their pages drawn when they are missing."""
    calibration, evaluation = bench.work / "calibration", bench.work / "evaluation"
    if not (calibration / "queries.jsonl").exists():
        demo = ROOT / "demo/pages/calibration"
        draw_pages(demo / "corpus", SAMPLES, calibration / "corpus")
        for name in ("texts.jsonl", "queries.jsonl"):
            shutil.copyfile(demo / name, calibration / name)
    if not (evaluation / "queries.jsonl").exists():
        demo = ROOT / "demo/pages/evaluation"
        draw_pages(demo / "corpus", GPU_PAGES, evaluation / "corpus")
        shutil.copyfile(demo / "queries.jsonl", evaluation / "queries.jsonl")
    return calibration, evaluation


def prepare_run(
    bench: Bench,
    name: str,
    recipe: Mapping[str, Any],
    samples: Mapping[str, int],
) -> Path:
    """Return a working folder with a params.yaml of one recipe, whose model is inspected.

    Parameters
    ----------
    bench
        What is measured.
    name
        Of the recipe.
    recipe
        Its values beside bits, group size and symmetry.
    samples
        Its calibration set; empty for none.
    """
    calibration, evaluation = prepare_data(bench)
    folder = bench.work / recipe_folder(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "demo").symlink_to(ROOT / "demo")
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["model"] |= {"source": str(bench.model.absolute()), "revision": None}
    params["calibration"]["dataset"] = str(calibration.absolute())
    params["calibration"]["sets"] = {"measured": {"queries": 1, "pages": 0, "passages": 0}}
    if samples:
        params["calibration"]["sets"]["measured"] |= {"queries": 0, **samples}
    weights = {"bits": 4, "group_size": 128, "sym": True}
    params["recipes"] = {name: {**weights, **recipe}}
    params |= {"fallbacks": {}, "release": {}}
    if {"queries", "pages"} <= samples.keys():
        params["sensitivity"] |= {"calibration": "measured", **samples}
    params["embed"] |= {"dtype": "bfloat16", "queries_per_batch": 16}
    params["evaluate"]["dataset"] = str(evaluation.absolute())
    params["benchmark"] |= SPEED
    params["compute"]["device"] = bench.device
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    bench.call(f"{name}-inspect", "-m", "stages.inspect_model", folder=folder)
    bench.call(f"{name}-allocate", "-m", "stages.allocate", folder=folder)
    # the same samples are made once
    key = "-".join(f"{part}{value}" for part, value in sorted(samples.items()))
    output, ready = folder / "artifacts/calibration", bench.work / f"samples-{key or 'none'}"
    if not ready.exists():
        bench.call(f"{name}-calibrate", "-m", "stages.calibrate", folder=folder)
        shutil.copytree(output, ready)
    elif not output.exists():
        shutil.copytree(ready, output)
    return folder


def quantize(bench: Bench, name: str, folder: Path) -> Result:
    """Run stage ``quantize`` in a working folder; add bytes, made and predicted."""
    result = bench.stage(name, folder, "stages.quantize", name)
    output = read_json(folder / f"artifacts/quantize/{name}.json", "run it again")
    foretold = read_json(folder / f"artifacts/allocation/{name}.json", "run it again")
    files, expected = output["bytes"]["files"], foretold["bytes"]
    return {
        **result,
        "files_bytes": files,
        "expected_bytes": expected,
        "bytes_off": round(files / expected - 1, 6),
        "calibration": output["calibration"],
    }


def warm(bench: Bench) -> None:
    """Read the source once, so that every step that follows finds it in the page cache alike."""
    bench.call(
        "warm", "-m", "demo.benchmarks.size_steps", "floor", bench.model, bench.work / "warm", "0"
    )


# ---- Steps -------------------------------------------------------------------------------------


def step_make(bench: Bench) -> Result:
    """Make the checkpoint again, timed, or for good when there is none."""
    out = bench.model.with_name(bench.model.name + "-timed")
    shutil.rmtree(out, ignore_errors=True)
    result = bench.call("make", "-m", "demo.benchmarks.true_size", *bench.size, "--out", out)
    if bench.model.exists():
        shutil.rmtree(out)
    else:
        out.rename(bench.model)
    return result


def step_inspect(bench: Bench) -> Result:
    """Inspect the folder; the start of Python alone is measured beside it."""
    empty = bench.call("python", "-c", "pass")
    result = bench.call("inspect", "-m", "colqwen3", "inspect", bench.model.absolute())
    counts = json.loads((bench.work / "inspect.log").read_text())["metrics"]
    return {
        **result,
        "python_alone_seconds": empty["seconds"],
        "parameters": counts["total"]["parameters"],
        "linears": counts["quantizable"]["linears"],
    }


def step_floor(bench: Bench) -> Result:
    """Read the source and write what a 4-bit checkpoint takes, and do nothing else."""
    warm(bench)
    config = read_config(bench)
    tensors, linears = layout.tensors(config), layout.linears(config)
    rest = sum(2 * math.prod(shape) for name, shape in tensors.items()
               if name.removesuffix(".weight") not in linears)  # fmt: skip
    packed = sum(layout.quantized_bytes(shape, 4, 128) for shape in linears.values())
    size = str((rest + packed) / 1e9)
    out = bench.work / "floor.bin"
    return bench.call("floor", "-m", "demo.benchmarks.size_steps", "floor", bench.model, out, size)


def step_rtn(bench: Bench) -> Result:
    """Round to nearest through the stage."""
    folder = prepare_run(bench, RTN, {"method": "rtn", "calibration": "none"}, {})
    warm(bench)
    return quantize(bench, RTN, folder)


def rounded(bench: Bench, name: str, parts: Mapping[str, Any]) -> Result:
    """Round to nearest, token embeddings and parts of the vision tower too."""
    recipe = {"method": "rtn", "calibration": "none", **parts}
    folder = prepare_run(bench, name, recipe, {})
    warm(bench)
    result = quantize(bench, name, folder)
    shutil.rmtree(bench.checkpoint(name))  # disk
    return result


def step_serve_small(bench: Bench) -> Result:
    """Serve a checkpoint with embeddings and vision tower in 8 bits: what it takes of the memory."""
    name = "rtn-8"
    recipe = {"method": "rtn", "calibration": "none", **EIGHT}
    quantize(bench, name, prepare_run(bench, name, recipe, {}))
    _, evaluation = prepare_data(bench)
    model, pages = bench.checkpoint(name), evaluation / "corpus"
    result = bench.call(
        "serve-small", "-m", "demo.benchmarks.size_steps", "serve", model, pages
    )  # fmt: skip
    shutil.rmtree(model)  # disk
    return result


def step_sensitivity(bench: Bench) -> Result:
    """Measure the sensitivity of all parts by streaming."""
    recipe = {"method": "rtn", "calibration": "none"}
    samples = {"queries": 8, "pages": 2}
    folder = prepare_run(bench, "sensitivity", recipe, samples)
    return bench.stage("sensitivity", folder, "stages.sensitivity")


def step_rtn_library(bench: Bench) -> Result:
    """Do the same by AutoRound's own model-free path; `step_rtn_equal` compares the two."""
    out = bench.work / "rtn-library"
    shutil.rmtree(out, ignore_errors=True)
    warm(bench)
    return bench.call(
        "rtn-library", "-m", "demo.benchmarks.size_steps", "model_free", bench.model, out
    )


def step_rtn_equal(bench: Bench) -> Result:
    """Count the tensors that both gave alike."""
    both = (bench.checkpoint(RTN), bench.work / "rtn-library")
    return bench.call("rtn-equal", "-m", "demo.benchmarks.size_steps", "compare", *both)


def embed(bench: Bench, name: str, model: Path, cap: float = 0) -> Result:
    """Embed queries and pages as stage ``embed`` does, with dense weights."""
    folder = bench.work / recipe_folder(RTN)
    if not folder.exists():
        prepare_run(bench, RTN, {"method": "rtn", "calibration": "none"}, {})
    _, evaluation = prepare_data(bench)
    gpu = bench.device == "cuda"
    # bfloat16 is slow on a CPU that lacks it: one page of the demo, small, must do
    pages = (evaluation if gpu else ROOT / "demo/pages/evaluation") / "corpus"
    return bench.call(
        name, "-m", "demo.benchmarks.size_steps", "embed",
        "--model", model.absolute(),
        "--pages", pages.absolute(),
        "--queries", ROOT / "demo/pages/evaluation/queries.jsonl",
        "--count", str(GPU_PAGES if gpu else 1),
        "--budgets", *map(str, BUDGETS if gpu else BUDGETS[:1]),
        "--dtype", "bfloat16",
        "--cap", str(cap),
        folder=folder,
    )  # fmt: skip


def step_embed(bench: Bench) -> Result:
    """Embed with the original."""
    return embed(bench, "embed", bench.model)


def step_embed_w4(bench: Bench) -> Result:
    """Embed with the 4-bit checkpoint, dequantized as stage ``embed`` does."""
    return embed(bench, "embed-w4", bench.checkpoint(RTN))


def step_speed(bench: Bench) -> Result:
    """Serve the original and the 4-bit checkpoint in turns, as stage ``benchmark`` does."""
    folder = bench.work / recipe_folder(RTN)
    result = bench.stage("speed", folder, "stages.benchmark", RTN)
    (timings,) = (folder / "artifacts/speed").glob(f"{RTN}-*.json")
    return {**result, **read_json(timings, "run it again")}


def step_embed_12gb(bench: Bench) -> Result:
    """Embed with the original on what a card of 12 GiB has."""
    return {"cap_gib": CAP_GIB, **embed(bench, "embed-12gb", bench.model, CAP_GIB)}


def step_tune_block(bench: Bench) -> Result:
    """AutoRound on a CPU until the first decoder layer is done, and what the whole would take.

    Two queries and two pages, a few iterations. The time by token and iteration is scaled to all
    layers, 200 iterations, and eight samples an iteration out of 16 pages and 16 queries.
    """
    name, iters, pairs = AUTOROUND, 4, 2
    values = {
        "method": "autoround", "calibration": "measured", "iters": iters, "lr": 0.005,
        "gradient_accumulate_steps": 2 * pairs, "seed": 42,
    }  # fmt: skip
    folder = prepare_run(bench, name, values, {"queries": pairs, "pages": pairs})
    tokens = sample_tokens(folder)
    state = folder / "artifacts/scratch" / name / "state.json"
    captured: list[float] = []

    def layer_is_done() -> bool:
        if not state.exists():
            return False
        captured.append(state.stat().st_mtime)
        return bool(json.loads(state.read_text())["steps"])

    usage = bench.measure(name, "-m", "stages.quantize", name, folder=folder, enough=layer_is_done)
    seconds = state.stat().st_mtime - captured[0]
    by_token = seconds / (sum(tokens) * iters)
    layers = read_config(bench)["text_config"]["num_hidden_layers"]
    hours = by_token * 200 * SAMPLES_PER_ITER * sum(tokens) / len(tokens) * layers / 3600
    return {
        **figures(usage),
        "iters": iters,
        "samples": len(tokens),
        "tokens": sum(tokens),
        "layer_seconds": round(seconds, 1),
        "projected_hours_200_iters": round(hours, 1),
    }


def sample_tokens(folder: Path) -> list[int]:
    """Return the length of each calibration sample of a working folder."""
    index = read_json(folder / "artifacts/calibration/measured/index.json", "run it again")
    return [sample["tokens"] for sample in index["samples"]]


def tune(
    bench: Bench,
    name: str,
    iters: int,
    samples: Mapping[str, int],
    batch: int = 8,
    parts: Mapping[str, Any] = NOTHING,
) -> Result:
    """AutoRound through the stage, eight samples a step, with its arithmetic operations.

    `batch` of them go through a layer at once.
    """
    recipe = {
        "method": "autoround", "calibration": "measured", "iters": iters, "seed": 42,
        "batch_size": batch, "gradient_accumulate_steps": 8 // batch, **parts,
    }  # fmt: skip
    folder = prepare_run(bench, name, recipe, samples)
    result = quantize(bench, name, folder)
    shutil.rmtree(bench.checkpoint(name))  # disk
    config = read_config(bench)
    operations = tuning_operations(config, sample_tokens(folder), iters, samples_per_iter=8)
    return {"iters": iters, "batch_size": batch, **result, "operations": operations}


MIXED = {"queries": SAMPLES, "pages": SAMPLES}


def gptq(bench: Bench, name: str, **more: Any) -> Result:
    """GPTQ through the stage on the samples of AutoRound; `more` are other values of the recipe."""
    recipe = {"method": "gptq", "calibration": "measured", "batch_size": 8, **more}
    result = quantize(bench, name, prepare_run(bench, name, recipe, MIXED))
    shutil.rmtree(bench.checkpoint(name))  # disk
    return {"batch_size": 8, **result}


def step_end_to_end(bench: Bench) -> Result:
    """GPTQ, and end-to-end tuning after it: what having the whole model costs."""
    steps = END_TO_END_STEPS
    return {"steps": steps, **gptq(bench, "end-to-end", end_to_end={"steps": steps})}


def step_tune_low(bench: Bench) -> Result:
    """AutoRound one sample at a time, on a model of four layers.

    One layer is on the GPU at a time, so the peak is that of the whole model.
    """
    return {"layers": LOW_LAYERS, **tune(shortened(bench), "tune-20-low", 20, MIXED, batch=1)}


def step_tune_small(bench: Bench) -> Result:
    """AutoRound of the whole vision tower and of four decoder layers, behind 8-bit embeddings."""
    result = tune(shortened(bench), "tune-small", 50, MIXED, parts=EIGHT)
    return {"layers": LOW_LAYERS, **result}


def shortened(bench: Bench) -> Bench:
    """Return the same with a model of four decoder layers, which is made when it is missing."""
    config = read_config(bench)
    config["text_config"]["num_hidden_layers"] = LOW_LAYERS
    path = bench.work / f"{LOW_LAYERS}-layers.json"
    write_json(path, config)
    short = replace(bench, size=("--config", str(path)), model=bench.work / path.stem)
    if not short.model.exists():
        step_make(short)
    return short


STEPS: dict[str, dict[str, Callable[[Bench], Result]]] = {
    "cpu": {
        "make": step_make,
        "inspect": step_inspect,
        "floor": step_floor,
        "rtn": step_rtn,
        "rtn-small": lambda bench: rounded(bench, "rtn-small", SMALL),
        "rtn-8": lambda bench: rounded(bench, "rtn-8", EIGHT),
        "rtn-8-e4": lambda bench: rounded(bench, "rtn-8-e4", {"token_embeddings": 4, "vision": 8}),
        "rtn-library": step_rtn_library,
        "rtn-equal": step_rtn_equal,
        "embed": step_embed,
        "embed-w4": step_embed_w4,
        "tune-block": step_tune_block,
    },
    "cuda": {
        "make": step_make,
        "rates": lambda bench: bench.call(
            "rates", "-m", "demo.benchmarks.size_steps", "peak_rates"
        ),
        "floor": step_floor,
        "rtn": step_rtn,
        "tune-0": lambda bench: tune(bench, "tune-0", 0, MIXED),
        "gptq": lambda bench: gptq(bench, "gptq"),
        "gptq-model": lambda bench: gptq(bench, "gptq-model", hessian="model"),
        "end-to-end": step_end_to_end,
        "tune-small": step_tune_small,
        "serve-small": step_serve_small,
        "sensitivity": step_sensitivity,
        "tune-50": lambda bench: tune(bench, "tune-50", 50, MIXED),
        "tune-200": lambda bench: tune(bench, "tune-200", 200, MIXED),
        "tune-200-text": lambda bench: tune(bench, "tune-200-text", 200, {"passages": SAMPLES}),
        "tune-50-text": lambda bench: tune(bench, "tune-50-text", 50, {"passages": SAMPLES}),
        "tune-20-low": step_tune_low,
        "embed": step_embed,
        "embed-w4": step_embed_w4,
        "embed-12gb": step_embed_12gb,
        "speed": step_speed,
    },
}


# ---- Results -----------------------------------------------------------------------------------


def ratios(steps: Mapping[str, Result], config: Mapping[str, Any]) -> dict[str, float]:
    """Return how measured times compare with each other and with the floor under them."""
    done = {name: step for name, step in steps.items() if step["status"] == "ok"}
    output: dict[str, float] = {}
    if "rtn" in done and "floor" in done:
        bytes_alone = done["floor"]["read_seconds"] + done["floor"]["write_seconds"]
        output["rtn / reading and writing its bytes"] = done["rtn"]["seconds"] / bytes_alone
    if "rtn" in done and "rtn-library" in done:
        output["rtn / AutoRound's model-free path"] = (
            done["rtn"]["seconds"] / done["rtn-library"]["seconds"]
        )
    if "rates" in done:
        rate = done["rates"]["bf16_flops"]
        for name, step in done.items():
            if "operations" in step:
                output[f"{name} / its operations at peak"] = (
                    step["seconds"] * rate / step["operations"]
                )
            for batches in step.get("budgets", ()):
                if "pages_per_second" in batches:
                    tokens = round(batches["tokens_per_page"])
                    minimum = page_operations(config, tokens, tokens - 11) / rate
                    budget = f"{name} ({batches['visual_tokens_per_batch']} visual tokens a batch)"
                    output[f"{budget} / its operations at peak"] = (
                        1 / batches["pages_per_second"] / minimum
                    )
    return {name: round(value, 3) for name, value in output.items()}


def describe(name: str, step: Result) -> str:
    """Return one line on a step."""
    if step["status"] != "ok":
        return f"{name}: failed: {step['error']}"
    line = f"{name}: {step['seconds']} s, own memory {step['peak_own_bytes'] / 1e9:.2f} GB"
    if "gpu_peak_bytes" in step:
        line += f", GPU {step['gpu_peak_bytes'] / 1e9:.2f} GB"
    for batches in step.get("budgets", ()):
        line += f"; {batches['visual_tokens_per_batch']} visual tokens a batch: "
        if "out_of_memory" in batches:
            line += "out of memory"
            continue
        line += f"{batches['pages_per_second']:.3g} pages/s"
        if "gpu_peak_bytes" in batches:
            line += f", GPU {batches['gpu_peak_bytes'] / 1e9:.2f} GB"
    return line


def run_steps(bench: Bench, names: list[str], results: Result, out: Path) -> None:
    """Run steps and write the results after each of them, failures included."""
    for name in names:
        load = os.getloadavg()[0]
        try:
            step = {"status": "ok", **STEPS[bench.device][name](bench)}
        except (StepError, UserError, OSError, ValueError, KeyError, IndexError) as error:
            logger.warning("%s failed: %s", name, error)
            step = {"status": "failed", "error": (str(error).splitlines() or [repr(error)])[-1]}
        results["steps"][name] = {**step, "load_before": round(load, 2)}
        if bench.model.exists():
            results["ratios"] = ratios(results["steps"], read_config(bench))
        write_json(out, results)
        print(describe(name, step), flush=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m demo.benchmarks.size", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", default="4b", help="sizes of a published model: 4b or 8b")
    which.add_argument("--config", type=Path, metavar="FILE", help="a config.json of any sizes")
    parser.add_argument("--device", choices=STEPS, default="cpu")
    parser.add_argument("--only", metavar="A,B", help="steps to add, in order; default: all")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", default=Path(tempfile.gettempdir()) / "size",
        help="where everything is written: 40 GB at 4b",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: metrics/size/<device>.json"
    )
    args = parser.parse_args()
    steps = STEPS[args.device]
    names = args.only.split(",") if args.only else list(steps)
    for name in names:
        if name not in steps:
            raise UserError(f"--only: {name!r} is no step; there are {', '.join(steps)}")
    size = args.config.stem if args.config else args.preset
    options = ("--config", str(args.config.absolute())) if args.config else ("--preset", size)
    bench = Bench(options, args.work.absolute(), args.device, args.work.absolute() / size)
    bench.work.mkdir(parents=True, exist_ok=True)
    out = args.out or RESULTS / f"{args.device}.json"
    made_of = {"machine": machine(args.device == "cuda"), "weights": WEIGHTS, "size": size}
    results = open_results(out, made_of, "steps", anew=not args.only)
    if not bench.model.exists() and "make" not in names:
        names = ["make", *names]
    run_steps(bench, names, results, out)
    for what, ratio in results.get("ratios", {}).items():
        print(f"{what}: {ratio}")


if __name__ == "__main__":
    run(main)
