"""Name, and with --yes delete, what recipes that are no longer in params.yaml have left behind.

DVC keeps the results of a stage that has gone. This removes them from the working tree; DVC's cache
and Git's history keep theirs (`dvc gc -w` empties the former).
"""

import argparse
import shutil
from collections.abc import Collection
from pathlib import Path

from colqwen3.system.errors import run
from stages.checking.params import RESERVED_NAMES, Params
from stages.pipeline.params import load_params
from stages.pipeline.paths import (
    BENCHMARKS,
    CHECKPOINTS,
    EMBEDDINGS,
    HEATMAPS,
    INDEX_METRICS,
    LOCKS,
    PLOTS,
    QUALITY_METRICS,
    QUANTIZE_METRICS,
    QUANTIZED,
    QUERY_METRICS,
    RELEASES,
    SCRATCH,
    SPEED,
    SUMMARIES,
    VERDICTS,
)

BY_RECIPE = (
    CHECKPOINTS, HEATMAPS, QUANTIZED, RELEASES, EMBEDDINGS, BENCHMARKS, VERDICTS, SCRATCH,
    QUALITY_METRICS, QUANTIZE_METRICS, QUERY_METRICS, INDEX_METRICS, SUMMARIES,
)  # fmt: skip
"""Folders whose entries are called by recipe: a folder, or a file with a suffix."""


def recipe_of(path: Path, folder: Path) -> str:
    """Return the recipe that an entry of a results folder belongs to, by its name."""
    if folder == SPEED:  # <recipe>-<digest>.json
        return path.stem.rpartition("-")[0]
    if folder == LOCKS:  # <stage>@<recipe>.lock
        return path.name.partition("@")[2].partition(".")[0]
    return path.name.partition(".")[0]


def find_leftovers(recipes: Collection[str]) -> list[Path]:
    """Return what lies in the results folders for recipes other than these, sorted."""
    known = {*recipes, *RESERVED_NAMES, "", "calibration"}
    paths = [
        path
        for folder in (*BY_RECIPE, SPEED, LOCKS)
        if folder.is_dir()
        for path in folder.iterdir()
        if recipe_of(path, folder) not in known
    ]
    if PLOTS.is_dir():  # plots of all recipes are files there
        paths += [path for path in PLOTS.iterdir() if path.is_dir() and path.name not in known]
    return sorted(paths)


def main() -> None:
    """Print what is left, and delete it if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.tools.clean_recipes", description=__doc__
    )
    parser.add_argument("--yes", action="store_true", help="delete it")
    delete = parser.parse_args().yes
    leftovers = find_leftovers(load_params(Params).recipes)
    for path in leftovers:
        print(path)
        if delete:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not leftovers:
        print("nothing is left of removed recipes")
    elif not delete:
        print("to delete these: python -m stages.tools.clean_recipes --yes")


if __name__ == "__main__":
    run(main)
