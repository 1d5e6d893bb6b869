"""What stage `allocate` writes of a recipe without a budget, as `quantize` reads it."""

from dataclasses import asdict
from pathlib import Path

from colqwen3.system.files import read_json
from stages.checking.params import Params
from stages.pipeline.params import load_params
from stages.pipeline.paths import ALLOCATION
from stages.quantization.allocation import uniform
from tests.helpers.metrics import write_json


def write_allocations(folder: Path, source: Path, *names: str) -> None:
    """Write the allocations of recipes of the params.yaml in `folder` for the model `source`."""
    recipes = load_params(Params, folder / "params.yaml").recipes
    config = read_json(source / "config.json", "")
    for name in names:
        allocation = asdict(uniform(name, recipes[name], config))
        write_json(folder / ALLOCATION / f"{name}.json", allocation)
