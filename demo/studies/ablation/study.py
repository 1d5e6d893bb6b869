"""The ablation: recipes that show why the default one is as it is.

A DVC project of its own, with its own params.yaml: ``cd demo/studies/ablation && dvc repro`` makes
and measures every recipe. ``python -m demo.studies.ablation RECIPE`` is one of its stages, and
``--original DATASET`` makes the embeddings that recipes are compared with. Both run the pipeline's
own stages, unchanged, in a folder of their own whose params.yaml holds no other recipe. A finished
checkpoint is measured and deleted: one at a time is on the disk. An edit of code makes no recipe
stale; ``--prove`` measures two anew and notes the code that gave the same figures.

``python -m demo.studies.ablation`` prints the results as tables in Markdown.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from ruamel.yaml import YAML

from colqwen3.checkpoint.hub import find_model
from colqwen3.inspection import inspect_folder
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json, write_json
from stages.calibration.sets import CalibrationSet
from stages.checking.params import Params, check_sets
from stages.pipeline.params import PARAMS_FILE, Section, check_names, load_params, suggest
from stages.pipeline.paths import (
    EMBEDDINGS,
    MANIFEST,
    MODEL_METRICS,
    QUALITY_METRICS,
    QUANTIZE_METRICS,
)
from stages.pipeline.stage import claim, code_digest
from stages.quantization.recipes import Recipe

ABLATION = Path("demo/studies/ablation")
METRICS = ABLATION / "metrics"  # one file per recipe
ORIGINALS = ABLATION / "artifacts/original"  # embeddings, one file per dataset
PROOF = ABLATION / "proof.json"  # the code that was shown to give the figures
PROVEN = ("rtn-w4g32", "mixed-w3g128-seed1")
"""Recipes that are measured anew to show it: a rounded and a tuned one."""
STAGES = ("calibrate", "allocate", "quantize", "embed", "evaluate")
WORK = ABLATION / "artifacts/work"  # one folder per running recipe
FIX = f"run `dvc repro` in {ABLATION}"
ORIGINAL = "original"
SEED = re.compile(r"-seed\d+$")  # recipes that differ in their seed alone are one row of a table
COLUMNS = (
    "recipe",
    "1 - cosine of page tokens",
    "1 - cosine of query tokens",
    "correlation of scores",
    "rank correlation of a query's scores",
    "change of nDCG@5 (95 % interval)",
    "bytes",
)


class AblationParams(Section):
    """params.yaml of the ablation: recipes, what they are tuned on, and what they are measured on."""

    datasets: dict[str, str] = Field(min_length=1)
    sets: dict[str, CalibrationSet]
    recipes: dict[str, Recipe]

    @model_validator(mode="after")
    def _sound(self) -> "AblationParams":
        check_names(self.datasets, {"quantize"})
        check_names(self.sets, {"none"})
        check_names(self.recipes, {ORIGINAL})
        check_sets(self.recipes, self.sets, "recipes", "sets")
        return self


def load_ablation() -> AblationParams:
    """Read the ablation's own params.yaml.

    Raises
    ------
    UserError
        If it is missing or wrong.
    """
    return load_params(AblationParams, ABLATION / "params.yaml")


def own_params(
    params: Params, ablation: AblationParams, dataset: str, recipe: str | None = None
) -> dict[str, Any]:
    """Return a params.yaml for a folder of its own: one dataset, and the recipe if there is one.

    Paths are absolute, since the folder is not the root of the repository.

    Raises
    ------
    UserError
        If the ablation has no such dataset or recipe.
    """
    values: dict[str, Any] = params.model_dump(exclude={"fallbacks", "release"})
    if Path(params.model.source).is_dir():  # otherwise a Hub id
        values["model"]["source"] = str(Path(params.model.source).resolve())
    values["calibration"]["dataset"] = str(Path(params.calibration.dataset).resolve())
    values["evaluate"]["dataset"] = str(
        Path(_find(ablation.datasets, "datasets", dataset)).resolve()
    )
    if recipe is not None:
        chosen = _find(ablation.recipes, "recipes", recipe)
        used = {name: s for name, s in ablation.sets.items() if name == chosen.calibration}
        values["recipes"] = {recipe: chosen.model_dump()}
        values["calibration"]["sets"] = {name: s.model_dump() for name, s in used.items()}
    return values


def _find(section: Mapping[str, Any], key: str, name: str) -> Any:
    if name not in section:
        raise UserError(
            f"{ABLATION / 'params.yaml'}: {key}.{name}: there is none{suggest(name, section)} "
            f"(known: {', '.join(section)})"
        )
    return section[name]


class Workspace:
    """A folder in which stages run on a params.yaml of their own."""

    def __init__(self, folder: Path, params: Params) -> None:
        self.folder = folder
        model = params.model
        manifest, metrics = inspect_folder(
            find_model(model.source, model.revision, model.trust_remote_code)
        )
        write_json(folder / MANIFEST, manifest)
        write_json(folder / MODEL_METRICS, metrics)

    def write_params(self, values: Mapping[str, Any]) -> None:
        """Write its params.yaml."""
        with (self.folder / PARAMS_FILE).open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(dict(values), file)

    def run(self, stage: str, *args: str) -> None:
        """Run ``python -m stages.<stage>`` in it.

        Raises
        ------
        UserError
            If the stage fails.
        """
        paths = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-m", f"stages.{stage}", *args],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
        if done.returncode:
            raise UserError(f"{self.folder}: stage {stage} failed; its message is above")

    def remove(self) -> None:
        """Delete it."""
        shutil.rmtree(self.folder)


def embed_original(params: Params, ablation: AblationParams, dataset: str) -> None:
    """Write the embeddings of a dataset by the original model."""
    values = own_params(params, ablation, dataset)
    space = Workspace(WORK / f"{ORIGINAL}-{dataset}", params)
    space.write_params(values)
    space.run("embed", ORIGINAL)
    ORIGINALS.mkdir(parents=True, exist_ok=True)
    os.replace(
        space.folder / EMBEDDINGS / f"{ORIGINAL}.safetensors", ORIGINALS / f"{dataset}.safetensors"
    )
    space.remove()


def measure_recipe(params: Params, ablation: AblationParams, recipe: str) -> dict[str, Any]:
    """Return the figures of a recipe: those of `quantize`, and those of `evaluate` by dataset."""
    datasets = list(ablation.datasets)
    values = {dataset: own_params(params, ablation, dataset, recipe) for dataset in datasets}
    space = Workspace(WORK / recipe, params)
    space.write_params(values[datasets[0]])
    space.run("calibrate")
    space.run("allocate")
    space.run("quantize", recipe)
    metrics = {}
    original = space.folder / EMBEDDINGS / f"{ORIGINAL}.safetensors"
    original.parent.mkdir(exist_ok=True)
    for dataset in datasets:
        space.write_params(values[dataset])
        original.unlink(missing_ok=True)
        original.symlink_to((ORIGINALS / f"{dataset}.safetensors").resolve())
        space.run("embed", recipe)
        space.run("evaluate", recipe)
        metrics[dataset] = read_json(space.folder / QUALITY_METRICS / f"{recipe}.json", FIX)
    metrics["quantize"] = read_json(space.folder / QUANTIZE_METRICS / f"{recipe}.json", FIX)
    space.remove()
    return metrics


def code() -> dict[str, str]:
    """Return the SHA-256 of the code of each stage that the figures are made by."""
    return {stage: code_digest(stage) for stage in STAGES}


def differing(figures: Any, known: Any, place: str = "") -> str | None:
    """Return where figures are not the known ones, or None; they may have more keys."""
    if isinstance(known, dict) and isinstance(figures, dict):
        places = (differing(figures.get(key), known[key], f"{place}.{key}") for key in known)
        return next((found for found in places if found), None)
    return None if figures == known else place.removeprefix(".")


def prove(params: Params, ablation: AblationParams) -> None:
    """Measure some recipes anew, and note the present code if every figure is the committed one.

    Raises
    ------
    UserError
        Naming the recipe and the first figure that differs.
    """
    present = code()  # before it can change
    for dataset in ablation.datasets:
        if not (ORIGINALS / f"{dataset}.safetensors").exists():
            embed_original(params, ablation, dataset)
    for recipe in PROVEN:
        known = read_json(METRICS / f"{recipe}.json", FIX)
        known["quantize"].pop("recipe")  # what was asked for is no figure
        if found := differing(measure_recipe(params, ablation, recipe), known):
            raise UserError(
                f"{METRICS / recipe}.json: this code, or this kind of CPU, gives another {found}; {FIX}"
            )
    write_json(PROOF, {"recipes": list(PROVEN), "code": present})


def group_seeds(recipes: Sequence[str]) -> dict[str, list[str]]:
    """Group recipes whose names differ in ``-seed<number>`` at the end, in the order given."""
    groups: dict[str, list[str]] = {}
    for recipe in recipes:
        groups.setdefault(SEED.sub("", recipe), []).append(recipe)
    return groups


def table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of what `evaluate` wrote about recipes, by name.

    Of several seeds it gives the mean and, after ±, the standard deviation (of a sample, n - 1);
    of the interval, the mean of each end.

    Raises
    ------
    KeyError, TypeError
        If the metrics lack a figure.
    """
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for label, members in group_seeds(list(metrics)).items():
        seeds = [metrics[name] for name in members]
        ndcg = [seed["retrieval"]["ndcg_at_5"] for seed in seeds]
        change, low, high = (
            statistics.fmean(figure[key] for figure in ndcg)
            for key in ("difference", "low", "high")
        )
        rows.append(
            (
                f"`{label}`" + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""),
                _spread([1 - seed["pages"]["cosine"]["mean"] for seed in seeds], 5),
                _spread([1 - seed["queries"]["cosine"]["mean"] for seed in seeds], 5),
                _spread([seed["retrieval"]["pearson"] for seed in seeds], 5),
                _spread([seed["retrieval"]["spearman"] for seed in seeds], 5),
                f"{change:+.4f} [{low:+.4f}, {high:+.4f}]",
                f"{seeds[0]['size']['files']['quantized']:,}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def print_tables(ablation: AblationParams) -> None:
    """Print one table per dataset, of the recipes in params.yaml that have metrics.

    Raises
    ------
    UserError
        If a metrics file is damaged, or there is none.
    """
    paths = {name: METRICS / f"{name}.json" for name in ablation.recipes}
    metrics = {name: read_json(path, FIX) for name, path in paths.items() if path.exists()}
    if not metrics:
        raise UserError(f"{METRICS}: holds no results; {FIX}")
    for dataset, folder in ablation.datasets.items():
        try:
            data = next(iter(metrics.values()))[dataset]["data"]
            text = table({name: figures[dataset] for name, figures in metrics.items()})
        except (KeyError, TypeError) as error:
            raise UserError(f"{METRICS}: lacks a figure ({error}); {FIX}") from None
        print(f"{folder}: {data['pages']} pages, {data['queries']} queries\n\n{text}\n")


def main() -> None:
    """Measure a recipe, embed with the original, or print the tables."""
    parser = argparse.ArgumentParser(prog="python -m demo.studies.ablation", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="a recipe of the ablation's params.yaml")
    parser.add_argument("--original", metavar="DATASET", help="a dataset of that file")
    parser.add_argument(
        "--prove", action="store_true", help="show that the present code gives the same figures"
    )
    args = parser.parse_args()
    if bool(args.recipe) + bool(args.original) + args.prove > 1:
        parser.error("give a recipe, --original or --prove, not several")
    ablation = load_ablation()
    if args.prove:
        claim("ablation-prove")
        prove(load_params(Params), ablation)
    elif args.original:
        claim(f"ablation-original@{args.original}")
        embed_original(load_params(Params), ablation, args.original)
    elif args.recipe:
        claim(f"ablation@{args.recipe}")
        metrics = measure_recipe(load_params(Params), ablation, args.recipe)
        write_json(METRICS / f"{args.recipe}.json", metrics)
    else:
        print_tables(ablation)
