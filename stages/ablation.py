"""Pipeline `ablation/dvc.yaml`: recipes that show why the default one is as it is.

`python -m stages.ablation RECIPE` makes and measures one recipe of ``ablation.recipes``, and
`python -m stages.ablation --original DATASET` the embeddings that it is compared with. Both run
the pipeline's own stages, unchanged, in a folder of their own whose params.yaml knows no other
recipe. A finished checkpoint is measured and deleted: one at a time is on the disk.

`python -m stages.ablation` prints the results as tables in Markdown.
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

from ruamel.yaml import YAML

from stages.errors import PipelineError, run
from stages.files import read_json, write_json
from stages.lock import claim
from stages.params import PARAMS_FILE, AblationParams, Params, load_params
from stages.paths import (
    ABLATION_METRICS,
    ABLATION_ORIGINALS,
    ABLATION_WORK,
    EMBEDDINGS,
    MANIFEST,
    METRICS,
    QUANTIZE_METRICS,
)

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


def ablation_of(params: Params) -> AblationParams:
    """Return the section ``ablation``.

    Raises
    ------
    PipelineError
        If params.yaml has none.
    """
    if params.ablation is None:
        raise PipelineError(f"{PARAMS_FILE}: has no section ablation; add it")
    return params.ablation


def own_params(params: Params, dataset: str, recipe: str | None = None) -> dict[str, Any]:
    """Return a params.yaml for a folder of its own: one dataset, and the recipe if there is one.

    Paths are absolute, since the folder is not the root of the repository.

    Raises
    ------
    PipelineError
        If the dataset or the recipe is not in the section ``ablation``.
    """
    ablation = ablation_of(params)
    values: dict[str, Any] = params.model_dump(exclude={"ablation"})
    if Path(params.model.source).is_dir():  # otherwise a Hub id
        values["model"]["source"] = str(Path(params.model.source).resolve())
    values["calibration"]["dataset"] = str(Path(params.calibration.dataset).resolve())
    values["evaluate"]["dataset"] = str(
        Path(_find(ablation.datasets, "datasets", dataset)).resolve()
    )
    if recipe is not None:
        made = _find(ablation.recipes, "recipes", recipe)
        used = {name: s for name, s in ablation.sets.items() if name == made.calibration}
        values["recipes"] = {recipe: made.model_dump()}
        values["calibration"]["sets"] = {name: s.model_dump() for name, s in used.items()}
    return values


def _find(section: Mapping[str, Any], key: str, name: str) -> Any:
    if name not in section:
        known = ", ".join(section)
        raise PipelineError(f"{PARAMS_FILE}: ablation.{key}.{name} does not exist; known: {known}")
    return section[name]


class Workspace:
    """A folder in which stages run on a params.yaml of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for path in (MANIFEST, METRICS / "model.json"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / path)

    def write_params(self, values: Mapping[str, Any]) -> None:
        """Write its params.yaml."""
        with (self.folder / PARAMS_FILE).open("w", encoding="utf-8") as file:
            YAML(typ="safe", pure=True).dump(dict(values), file)

    def run(self, stage: str, *args: str) -> None:
        """Run ``python -m stages.<stage>`` in it.

        Raises
        ------
        PipelineError
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
            raise PipelineError(f"{self.folder}: stage {stage} failed; its message is above")

    def remove(self) -> None:
        """Delete it."""
        shutil.rmtree(self.folder)


def embed_original(params: Params, dataset: str) -> None:
    """Write artifacts/ablation/original/<dataset>.safetensors."""
    values = own_params(params, dataset)
    space = Workspace(ABLATION_WORK / f"{ORIGINAL}-{dataset}")
    space.write_params(values)
    space.run("embed", ORIGINAL)
    ABLATION_ORIGINALS.mkdir(parents=True, exist_ok=True)
    os.replace(
        space.folder / EMBEDDINGS / f"{ORIGINAL}.safetensors",
        ABLATION_ORIGINALS / f"{dataset}.safetensors",
    )
    space.remove()


def measure_recipe(params: Params, recipe: str) -> None:
    """Write ablation/metrics/<recipe>.json: what `quantize` counted, and `evaluate` by dataset."""
    datasets = list(ablation_of(params).datasets)
    values = {dataset: own_params(params, dataset, recipe) for dataset in datasets}
    space = Workspace(ABLATION_WORK / recipe)
    space.write_params(values[datasets[0]])
    space.run("calibrate")
    space.run("quantize", recipe)
    mend = f"run `dvc repro ablation/dvc.yaml:recipe@{recipe}`"
    metrics = {"quantize": read_json(space.folder / QUANTIZE_METRICS / f"{recipe}.json", mend)}
    original = space.folder / EMBEDDINGS / f"{ORIGINAL}.safetensors"
    original.parent.mkdir(exist_ok=True)
    for dataset in datasets:
        space.write_params(values[dataset])
        original.unlink(missing_ok=True)
        original.symlink_to((ABLATION_ORIGINALS / f"{dataset}.safetensors").resolve())
        space.run("embed", recipe)
        space.run("evaluate", recipe)
        metrics[dataset] = read_json(space.folder / METRICS / f"{recipe}.json", mend)
    write_json(ABLATION_METRICS / f"{recipe}.json", metrics)
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


def print_tables(params: Params) -> None:
    """Print one table a dataset, of the recipes in params.yaml that have metrics.

    Raises
    ------
    PipelineError
        If a metrics file is damaged, or there is none.
    """
    ablation, mend = ablation_of(params), "run `dvc repro ablation/dvc.yaml`"
    paths = {name: ABLATION_METRICS / f"{name}.json" for name in ablation.recipes}
    metrics = {name: read_json(path, mend) for name, path in paths.items() if path.exists()}
    if not metrics:
        raise PipelineError(f"{ABLATION_METRICS}: holds no results; {mend}")
    for dataset, folder in ablation.datasets.items():
        try:
            data = next(iter(metrics.values()))[dataset]["data"]
            text = table({name: found[dataset] for name, found in metrics.items()})
        except (KeyError, TypeError) as error:
            raise PipelineError(f"{ABLATION_METRICS}: lacks a figure ({error}); {mend}") from None
        print(f"{folder}: {data['pages']} pages, {data['queries']} queries\n\n{text}\n")


def main() -> None:
    """Measure a recipe, embed with the original, or print the tables."""
    parser = argparse.ArgumentParser(prog="python -m stages.ablation", description=__doc__)
    parser.add_argument("recipe", nargs="?", help="a key of ablation.recipes in params.yaml")
    parser.add_argument("--original", metavar="DATASET", help="a key of ablation.datasets")
    args = parser.parse_args()
    if args.recipe and args.original:
        parser.error("give a recipe or --original, not both")
    params = load_params()
    if args.original:
        claim(f"ablation-original@{args.original}")
        embed_original(params, args.original)
    elif args.recipe:
        claim(f"ablation@{args.recipe}")
        measure_recipe(params, args.recipe)
    else:
        print_tables(params)


if __name__ == "__main__":
    run(main)
