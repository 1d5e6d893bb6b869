"""One size of the study, from training to figures."""

import argparse
import hashlib
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ruamel.yaml import YAML

from colqwen3.inspection import inspect_folder
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json, write_json
from demo.benchmarks.measure import machine
from demo.studies.scale.contenders import (
    ALL_CONTENDERS,
    BATCH_SIZE,
    CONTENDERS,
    FRONTIER,
    ROUNDING,
    TEXT,
    Run,
    byte_budgets,
    group_size,
    pipeline_params,
    plan,
)
from demo.studies.scale.losses import KINDS, measure_losses, measure_search
from demo.studies.scale.stagehand import run_stages
from demo.training.shapes import SIZES, named_size
from stages.pipeline.paths import SENSITIVITY

ROOT = Path(__file__).resolve().parents[3]
TRAINING = "demo.training.train"
CALIBRATION = ROOT / "demo/pages/calibration"
PAGE_SETS = (ROOT / "demo/pages/evaluation", ROOT / "demo/pages/evaluation2")
WORK = Path("artifacts/studies/scale")
ORIGINAL = "original"
VISUAL_TOKENS = 5120
"""Of a batch of pages: small models leave a GPU waiting with fewer."""


@dataclass(frozen=True)
class Bench:
    """Where a size is measured.

    Attributes
    ----------
    folder : Path
        Work folder, with the params.yaml of all recipes.
    model : Path
        The model to quantize.
    page_sets : tuple of Path
        What it is measured on, folders in the BEIR convention.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """

    folder: Path
    model: Path
    page_sets: tuple[Path, ...]
    device: str = "auto"

    def embeddings(self, name: str, page_set: Path) -> Path:
        """Return where the embeddings of the original or of a recipe lie."""
        return self.folder / "embeddings" / f"{name}-{page_set.name}.safetensors"

    def log(self, name: str) -> Path:
        """Return where the record of a task goes."""
        return self.folder / "logs" / f"{name}.log"

    def embed_command(self, model: Path, name: str, page_set: Path) -> list[str]:
        """Return the stage that embeds a page set, and its arguments."""
        return [
            "colqwen3",
            "embed",
            *("--model", str(model)),
            *("--queries", str(page_set / "queries.jsonl")),
            *("--pages", str(page_set / "corpus")),
            *("--out", str(self.embeddings(name, page_set))),
            *("--device", self.device),
            *("--visual-tokens-per-batch", str(VISUAL_TOKENS)),
        ]


def prepare(bench: Bench) -> dict[str, Any]:
    """Do once what all recipes need, widths of weights included; runs in a process of the pool.

    Returns
    -------
    dict
        The loss of each part of the model alone, by part and bits; empty if no recipe asks for it.
    """
    stages = ("inspect_model", "calibrate", "sensitivity", "allocate")
    run_stages(ROOT, bench.folder, bench.log("prepare"), [[stage] for stage in stages])
    measured = read_json(bench.folder / SENSITIVITY, "run the study again")
    return {part: item["loss"] for part, item in measured["items"].items()}


def embed_original(bench: Bench, page_set: Path) -> dict[str, Any]:
    """Embed a page set with the original and return how well that searches; runs in the pool."""
    out = bench.embeddings(ORIGINAL, page_set)
    if not out.exists():
        command = bench.embed_command(bench.model, ORIGINAL, page_set)
        run_stages(ROOT, bench.folder, bench.log(f"{ORIGINAL}-{page_set.name}"), [command])
    return measure_search(out, page_set)


def measure_run(bench: Bench, run: Run) -> dict[str, Any]:
    """Make a recipe's checkpoint, measure it and delete it; runs in a process of the pool."""
    start = time.time()
    checkpoint = bench.folder / "artifacts/checkpoints" / run.name
    commands = [
        ["quantize", run.name],
        *(bench.embed_command(checkpoint, run.name, page_set) for page_set in bench.page_sets),
    ]
    seconds = run_stages(ROOT, bench.folder, bench.log(run.name), commands)
    record = read_json(bench.folder / f"artifacts/quantize/{run.name}.json", "run the study again")
    losses = {}
    for page_set in bench.page_sets:
        files = [bench.embeddings(name, page_set) for name in (ORIGINAL, run.name)]
        losses[page_set.name] = measure_losses(*files)
        files[1].unlink()
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()
    return {
        "contender": run.contender,
        "bits": run.bits,
        "seed": run.seed if ALL_CONTENDERS[run.contender].tuned else None,
        "bits_by_part": record["bits"],
        "samples": {kind: record["calibration"][kind] for kind in ("queries", "pages", "passages")},
        "calibration_tokens": record["calibration"]["tokens"],
        "relative_weight_error": round(fmean(record["relative_weight_error"].values()), 6),
        "layers_worse_than_rounding": record["layers_worse_than_rounding"],
        "bytes": record["bytes"]["files"],
        "loss": losses,
        "quantize_seconds": round(seconds[0], 1),
        "seconds": round(time.time() - start, 1),
    }


def add_ratios(recipes: dict[str, dict[str, Any]]) -> None:
    """Set what each recipe's losses are of plain rounding's, and of text-only tuning's.

    Of several seeds of text-only tuning it is the mean.  ``ratio`` has ``to_rounding`` and
    ``to_text``, where there is one of the same bits, as ``loss`` is laid out.
    """
    for recipe in recipes.values():
        recipe["ratio"] = {}
        for key, contender in (("to_rounding", ROUNDING), ("to_text", TEXT)):
            peers = [
                peer["loss"]
                for peer in recipes.values()
                if peer["contender"] == contender and peer["bits"] == recipe["bits"]
            ]
            if peers:
                recipe["ratio"][key] = {
                    name: {
                        kind: _ratio(loss, fmean(peer[name][kind] for peer in peers))
                        for kind, loss in figures.items()
                    }
                    for name, figures in recipe["loss"].items()
                }


def _ratio(loss: float, other: float) -> float | None:
    return round(loss / other, 4) if other > 0 else None


def digest_model(folder: Path) -> str:
    """Return one SHA-256 over config.json and the weights of a model folder."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        digest.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def count_weights(folder: Path) -> dict[str, int]:
    """Return the parameters of the vision tower, the text tower and the projection."""
    from safetensors import safe_open

    parts = {"visual.": "vision", "language_model.": "text", "embedding_proj_layer.": "projection"}
    counts = dict.fromkeys(parts.values(), 0)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no dictionary
                part = next(part for piece, part in parts.items() if piece in name)
                counts[part] += math.prod(file.get_slice(name).get_shape())
    return counts


def train(options: argparse.Namespace, model: Path, log: Path) -> None:
    """Train the study model, unless it is there.

    Raises
    ------
    UserError
        If the training fails, or the model that is there was trained in other sizes.
    """
    finished, sizes = model.with_name("trained"), repr(options.size)
    if finished.exists():
        if finished.read_text("utf-8") != sizes:
            raise UserError(
                f"{model}: was trained in other sizes than those of {options.size_given}; remove "
                f"{model.parent}, or name another --work"
            )
        return
    command = [sys.executable, "-m", TRAINING, "--shape", options.size_given]
    command += ["--out", str(model), "--log", str(log), "--device", options.training_device]
    for name in ("minutes", "wall_minutes", "workers", "every", "measure_minutes", "library"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    if options.fonts:
        command += ["--fonts", *map(str, options.fonts)]
    done = subprocess.run(command, env=_environment(), check=False)
    if done.returncode:
        raise UserError(f"{TRAINING} failed; its message is above")
    finished.write_text(sizes, "utf-8")


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def describe_training(log: Path) -> dict[str, Any] | None:
    """Return what a log of the training program says, without its course; None if there is none."""
    if not log.exists():
        return None
    written: dict[str, Any] = read_json(log, "train again")
    return {
        **{key: value for key, value in written.items() if key not in ("steps", "held_out")},
        "steps": (written["held_out"] or [{"step": 0}])[-1]["step"],
        "held_out": written["held_out"][-1] if written["held_out"] else None,
        "log": log.name,
    }


def open_results(path: Path, identity: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return earlier results to add to, or new ones.

    Parameters
    ----------
    path : Path
        The JSON file.
    identity : dict
        What earlier results must have in common with these.
    others : dict
        What is noted beside it.

    Raises
    ------
    UserError
        If there are earlier results of another model or other settings.
    """
    if not path.exists():
        return {**identity, **others, "recipes": {}}
    results: dict[str, Any] = read_json(path, "remove it")
    for key, value in identity.items():
        if results.get(key) != value:
            raise UserError(f"{path}: is of another {key}; remove it or name another --out")
    return results


def write_params(bench: Bench, runs: Sequence[Run], options: argparse.Namespace) -> int:
    """Write the params.yaml of all recipes and return the group size that fits the model.

    Raises
    ------
    UserError
        If no group size fits.
    """
    config = read_json(bench.model / "config.json", "give a complete model folder")
    try:
        vision = any(ALL_CONTENDERS[run.contender].quantizes_vision for run in runs)
        group = group_size(config, vision)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{bench.model}/config.json: {error}") from None
    yaml = YAML(typ="safe", pure=True)
    budgets = byte_budgets(runs, inspect_folder(bench.model)[1], config, group)
    values = pipeline_params(
        yaml.load((ROOT / "params.yaml").read_text("utf-8")),
        runs,
        str(bench.model),
        str(options.calibration.resolve()),
        group,
        options.iters,
        options.shrink,
        options.device,
        budgets,
    )
    for name in ("logs", "embeddings"):
        (bench.folder / name).mkdir(parents=True, exist_ok=True)
    with (bench.folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(values, file)
    return group


def measure_all(
    bench: Bench, runs: Sequence[Run], results: dict[str, Any], path: Path, jobs: int
) -> None:
    """Measure the runs that the results lack and write the results after each.

    Raises
    ------
    UserError
        If a run fails, once all others are done.
    """
    missing = [run for run in runs if run.name not in results["recipes"]]
    if not missing:
        return
    problems = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        first = pool.submit(prepare, bench)
        searches = {item.name: pool.submit(embed_original, bench, item) for item in bench.page_sets}
        if sensitivity := first.result():
            results["sensitivity"] = sensitivity
        results["page_sets"] = {name: search.result() for name, search in searches.items()}
        write_json(path, results)
        futures: dict[Future[dict[str, Any]], Run] = {
            pool.submit(measure_run, bench, run): run for run in missing
        }
        for future in as_completed(futures):
            run = futures[future]
            try:
                results["recipes"][run.name] = future.result()
            except BrokenProcessPool:
                raise UserError(
                    "a process was killed, perhaps for want of memory; "
                    "run again with fewer --jobs, and it goes on"
                ) from None
            except Exception as error:
                problems.append(f"{run.name}: {error}")
                print(problems[-1], file=sys.stderr, flush=True)
                continue
            add_ratios(results["recipes"])
            write_json(path, results)
            print(describe(run, results["recipes"][run.name]), flush=True)
    if problems:
        raise UserError(f"{len(problems)} of {len(missing)} recipes failed, {problems[0]}")


def describe(run: Run, recipe: dict[str, Any]) -> str:
    """Return one line about a measured recipe."""
    figures = ", ".join(
        f"{name} {' / '.join(f'{loss[kind]:.6f}' for kind in KINDS)}"
        for name, loss in recipe["loss"].items()
    )
    return f"{run.name}: loss of pages / queries {figures}; {recipe['seconds']:.0f} s"


def describe_command(options: argparse.Namespace) -> str:
    """Return the command line, without folders, which differ from machine to machine."""
    words = ["python -m demo.studies.scale --out DIR"]
    if options.frontier:
        words.append("--frontier")
    words.append(f"--shape {Path(options.size_given).name}")
    for name in ("jobs", "iters", "seeds", "bits", "contenders", "shrink"):
        value = getattr(options, name)
        values = value if isinstance(value, list) else [value]
        if value is not None:
            words += [f"--{name}", *map(str, values)]
    if options.model is not None:
        words += ["--model", "MODEL"]
    return " ".join(words)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.studies.scale", description=__doc__)
    parser.add_argument(
        "--shape", type=named_size, required=True, metavar="SIZE",
        help=f"{', '.join(SIZES)}, or a JSON file of sizes, see demo/training/shapes.py",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument(
        "--name", help="of the file of figures: <shape>, or frontier-<shape> with --frontier"
    )
    parser.add_argument("--model", type=Path, help="a trained model of the shape; else it trains")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of unfinished work")
    parser.add_argument("--train-only", action="store_true", help="end once the model is trained")
    measured = parser.add_argument_group("what is measured")
    measured.add_argument("--jobs", type=int, default=1, help="recipes at a time")
    measured.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    measured.add_argument("--contenders", nargs="+", choices=list(ALL_CONTENDERS), metavar="NAME")
    measured.add_argument(
        "--frontier", action="store_true", help=f"loss against bytes, by {', '.join(FRONTIER)}"
    )
    measured.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4, 8), default=[4, 3])
    measured.add_argument("--seeds", type=int, nargs="+", default=[1])
    measured.add_argument("--iters", type=int, default=200, help="tuning steps a layer")
    measured.add_argument("--calibration", type=Path, default=CALIBRATION, metavar="DIR")
    measured.add_argument("--page-sets", type=Path, nargs="+", default=PAGE_SETS, metavar="DIR")
    measured.add_argument(
        "--shrink", type=int, default=1, help="divides the samples: to try the program out"
    )
    training = parser.add_argument_group("training, as of demo.training.train")
    training.add_argument("--training-device", choices=("cpu", "cuda"), default="cuda")
    training.add_argument("--minutes", type=float, default=9.0)
    training.add_argument("--wall-minutes", type=float)
    training.add_argument("--workers", type=int)
    training.add_argument("--every", type=int)
    training.add_argument("--measure-minutes", type=float)
    training.add_argument("--library", type=Path, metavar="DIR")
    training.add_argument("--fonts", type=Path, nargs="*", default=[])
    training.add_argument(
        "--training-log", type=Path, help="of a --model; <out>/<shape>.training.json if it is there"
    )
    options = parser.parse_args(arguments)
    for name in ("jobs", "iters", "shrink"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    options.shape, options.size, options.size_given = options.shape
    options.name = options.name or f"{'frontier-' * options.frontier}{options.shape}"
    if options.contenders is None:
        options.contenders = list(FRONTIER if options.frontier else CONTENDERS)
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        parser.error("--seeds must be different numbers, none below 0")
    names = [page_set.resolve().name for page_set in options.page_sets]
    if len(set(names)) < len(names):
        parser.error("--page-sets must be folders of different names")
    return options


def main() -> None:
    """Train and measure one size."""
    options = parse_arguments()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = (options.work / options.shape).resolve()
    log = options.training_log or out / f"{options.shape}.training.json"
    if options.model is None:
        model = work / "model"
        train(options, model, log)
    else:
        model = options.model.resolve()
    if not (model / "config.json").exists():
        raise UserError(f"{model}: holds no model; give another --model")
    if options.train_only:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sha256 = digest_model(model)
    page_sets = tuple(path.resolve() for path in options.page_sets)
    bench = Bench(work / sha256[:12], model, page_sets, options.device)
    runs = plan(options.contenders, options.bits, options.seeds)
    group = write_params(bench, runs, options)
    parameters = count_weights(model)
    config = read_json(model / "config.json", "give a complete model folder")
    text, vision = config["text_config"], config["vision_config"]
    identity = {
        "shape": options.shape,
        "model_sha256": sha256,
        "settings": {
            "group_size": group,
            "iters": options.iters,
            "batch_size": BATCH_SIZE,
            "gradient_accumulate_steps": 1,
            "shrink": options.shrink,
            "calibration": options.calibration.resolve().name,
            "page_sets": [path.name for path in page_sets],
        },
    }
    total = sum(parameters.values())
    notes = {
        "what": f"a study model of {total:,} parameters, trained for this; not the 4B model",
        "loss": "1 - mean cosine of tokens to the original's",
        "parameters": {**parameters, "total": total},
        "original_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "depth": {
            "text_layers": text["num_hidden_layers"],
            "text_hidden": text["hidden_size"],
            "vision_blocks": vision["depth"],
            "vision_hidden": vision["hidden_size"],
            "deepstack": vision["deepstack_visual_indexes"],
        },
        "training": describe_training(log),
        "machine": machine(options.device != "cpu"),
        "command": describe_command(options),
    }
    path = out / f"{options.name}.json"
    results = open_results(path, identity, notes)
    measure_all(bench, runs, results, path, options.jobs)
