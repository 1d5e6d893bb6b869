"""Stage `allocate`: how many bits each weight of each recipe gets, and the bytes that follow."""

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.system.errors import run
from colqwen3.system.files import fresh_folder, publish_folder, read_json, write_json
from stages.budget.knapsack import allocate
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import ModelParams, Sections, load_params
from stages.pipeline.paths import ALLOCATION, SCRATCH, SENSITIVITY
from stages.pipeline.stage import claim, stage_parser
from stages.quantization.allocation import describe, planned_tensors, uniform
from stages.quantization.recipes import Recipe


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    recipes: dict[str, Recipe]


def main() -> None:
    """Write artifacts/allocation/<recipe>.json for every recipe."""
    stage_parser("allocate", __doc__).parse_args()
    params = load_params(Params)
    claim("allocate")
    manifest = read_manifest()
    source = Checkpoint.read(find_inspected_model(params.model, manifest))
    needed = any(recipe.has_budget for recipe in params.recipes.values())
    sensitivity = read_json(SENSITIVITY, "run `dvc repro sensitivity`") if needed else {}
    partial = fresh_folder(SCRATCH / ALLOCATION.name)
    for name, recipe in params.recipes.items():
        allocation = (
            allocate(name, recipe, manifest["config"], source.tensors, sensitivity)
            if recipe.has_budget
            else uniform(name, recipe, manifest["config"])
        )
        tensors = planned_tensors(source.tensors, allocation, recipe.group_size)
        write_json(partial / f"{name}.json", describe(allocation, tensors))
    publish_folder(partial, ALLOCATION)


if __name__ == "__main__":
    run(main)
