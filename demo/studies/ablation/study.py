"""The ablation: recipes that show why the default one is as it is.

A DVC project of its own, with its own params.yaml: ``cd demo/studies/ablation && dvc repro`` makes
and measures every recipe. ``python -m demo.studies.ablation RECIPE`` is one of its stages, and
``--original DATASET`` makes the embeddings that recipes are compared with. Both run the pipeline's
own stages, unchanged, in a folder of their own whose params.yaml holds no other recipe. A finished
checkpoint is measured and deleted: one at a time is on the disk.

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
    SENSITIVITY,
)
from stages.pipeline.stage import claim
from stages.quantization.recipes import AnyRecipe, Recipe

ABLATION = Path("demo/studies/ablation")
METRICS = ABLATION / "metrics"  # one file per recipe
ORIGINALS = ABLATION / "artifacts/original"  # embeddings, one file per dataset
SENSITIVITY_FILE = ABLATION / "artifacts/sensitivity.json"
FRONTIER_PLOT = Path("docs/images/frontier.svg")
UNIFORM = {"more-200-w3g128-seed1": "w3", "more-200-w4g128-seed1": "w4"}
"""Recipes of the ablation that the frontier is compared with -> their names there."""
SAMPLES = "more-seed1"  # that the sensitivity is measured on
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
    smaller: dict[str, Recipe] = Field(default_factory=dict)

    @property
    def all_recipes(self) -> dict[str, AnyRecipe]:
        """Return the recipes of the ablation and of the frontier."""
        return {**self.recipes, **self.smaller}

    @model_validator(mode="after")
    def _sound(self) -> "AblationParams":
        check_names(self.datasets, {"quantize"})
        check_names(self.sets, {"none"})
        check_names(self.recipes, {ORIGINAL})
        check_names(self.smaller, {ORIGINAL, *self.recipes})
        check_sets(self.recipes, self.sets, "recipes", "sets")
        check_sets(self.smaller, self.sets, "smaller", "sets")
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
        chosen = _find(ablation.all_recipes, "recipes", recipe)
        used = {name: s for name, s in ablation.sets.items() if name == chosen.calibration}
        values["recipes"] = {recipe: chosen.model_dump()}
        values["calibration"]["sets"] = {name: s.model_dump() for name, s in used.items()}
        values["sensitivity"]["calibration"] = chosen.calibration if chosen.has_budget else "none"
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


def measure_recipe(params: Params, ablation: AblationParams, recipe: str) -> None:
    """Write metrics/<recipe>.json: the figures of `quantize`, and of `evaluate` by dataset."""
    datasets = list(ablation.datasets)
    values = {dataset: own_params(params, ablation, dataset, recipe) for dataset in datasets}
    space = Workspace(WORK / recipe, params)
    space.write_params(values[datasets[0]])
    space.run("calibrate")
    if ablation.all_recipes[recipe].has_budget:
        shutil.copyfile(SENSITIVITY_FILE, space.folder / SENSITIVITY)
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
    write_json(METRICS / f"{recipe}.json", metrics)
    space.remove()


def measure_sensitivity(params: Params, ablation: AblationParams) -> None:
    """Write artifacts/sensitivity.json, and the same as metrics/sensitivity.json."""
    dataset = next(iter(ablation.datasets))
    values = own_params(params, ablation, dataset)
    values["calibration"]["sets"] = {SAMPLES: ablation.sets[SAMPLES].model_dump()}
    values["sensitivity"]["calibration"] = SAMPLES
    space = Workspace(WORK / "sensitivity", params)
    space.write_params(values)
    space.run("calibrate")
    space.run("sensitivity")
    result = read_json(space.folder / SENSITIVITY, FIX)
    for path in (SENSITIVITY_FILE, METRICS / SENSITIVITY_FILE.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    space.remove()


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


def frontier_points(dataset: str) -> list[dict[str, Any]]:
    """Return loss against bytes of the frontier's recipes and of the default's, smallest first.

    Parameters
    ----------
    dataset
        Name of the dataset that the losses are measured on.

    Returns
    -------
    list
        For each recipe ``recipe``, ``way`` (how its widths came about), ``mb`` (bytes / 10^6),
        ``pages`` and ``queries`` (1 - mean cosine of tokens).

    Raises
    ------
    UserError
        If a metrics file is damaged.
    """
    ablation = load_ablation()
    recipes = {name: ablation.recipes[name] for name in UNIFORM} | ablation.smaller
    points = []
    for name, recipe in recipes.items():
        path = METRICS / f"{name}.json"
        if not path.exists():
            continue
        figures = read_json(path, FIX)[dataset]
        parts = recipe.token_embeddings is not None
        budget = (
            "budget of bytes" if recipe.bytes else "budget of bits" if recipe.has_budget else None
        )
        way = budget or ("embeddings and vision too" if parts else "uniform")
        points.append(
            {
                "recipe": UNIFORM.get(name, name),
                "way": way,
                "mb": figures["size"]["files"]["quantized"] / 1e6,
                **{kind: 1 - figures[kind]["cosine"]["mean"] for kind in ("pages", "queries")},
            }
        )
    return sorted(points, key=lambda point: (point["mb"], point["recipe"]))


def draw_frontier(path: Path) -> None:
    """Write the plot of the frontier as SVG."""
    from stages.tools.charts import frontier_chart, svg

    points = frontier_points(next(iter(load_ablation().datasets)))
    panels = [frontier_chart(points, kind) for kind in ("pages", "queries")]
    path.write_text(svg({"hconcat": panels}), encoding="utf-8")


def print_tables(ablation: AblationParams) -> None:
    """Print one table per dataset, of the recipes in params.yaml that have metrics.

    Raises
    ------
    UserError
        If a metrics file is damaged, or there is none.
    """
    paths = {name: METRICS / f"{name}.json" for name in ablation.all_recipes}
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
    parser.add_argument("--sensitivity", action="store_true", help="measure what each part bears")
    parser.add_argument("--plot", action="store_true", help=f"write {FRONTIER_PLOT}")
    args = parser.parse_args()
    if bool(args.recipe) + bool(args.original) + args.sensitivity > 1:
        parser.error("give a recipe, --original or --sensitivity, not several")
    if args.plot:
        draw_frontier(FRONTIER_PLOT)
        return
    ablation = load_ablation()
    if args.sensitivity:
        claim("ablation-sensitivity")
        measure_sensitivity(load_params(Params), ablation)
        return
    if args.original:
        claim(f"ablation-original@{args.original}")
        embed_original(load_params(Params), ablation, args.original)
    elif args.recipe:
        claim(f"ablation@{args.recipe}")
        measure_recipe(load_params(Params), ablation, args.recipe)
    else:
        print_tables(ablation)
