"""Results of three recipes, one of which breaks a limit, and the params.yaml that they are of."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.checking.params import Params
from stages.evaluation.summary import summarize
from stages.pipeline.params import load_params
from tests.helpers.metrics import WITHIN_THE_LIMITS, quality, write_json

ROUNDED = {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True}
TUNED = {**ROUNDED, "method": "autoround", "calibration": "mixed", "iters": 200, "seed": 1}


def write_project(folder: Path) -> None:
    """Write params.yaml of the recipes "bad", "rounded" and "tuned"."""
    params = YAML(typ="safe", pure=True).load(Path("params.yaml").read_text())
    params.update(recipes={"rounded": ROUNDED, "tuned": TUNED, "bad": ROUNDED}, release={})
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(params, file)


def write_results() -> None:
    """Write the metrics of the three recipes into the current folder."""
    write_result("rounded", quality(page=0.99, **WITHIN_THE_LIMITS))
    write_result("tuned", quality(page=0.999765, **WITHIN_THE_LIMITS))
    bad = quality(page=0.5, **WITHIN_THE_LIMITS)
    bad["size"]["files"]["quantized"] = 5_000_000
    write_result("bad", bad)


def write_result(name: str, metrics: dict[str, Any]) -> None:
    """Write what `evaluate` writes of a recipe."""
    write_json(Path(f"metrics/quality/{name}.json"), metrics)
    params = load_params(Params)
    recipe = {"ran": name, "values": params.recipes[name].model_dump()}
    write_json(Path(f"metrics/quantize/{name}.json"), {"libraries": {}, "recipe": recipe})
    write_json(Path(f"metrics/index/{name}.json"), {"formats": {}})
    write_json(Path(f"metrics/summary/{name}.json"), summarize(metrics, params.gate))
    Path(f"artifacts/checkpoints/{name}").mkdir(parents=True, exist_ok=True)
