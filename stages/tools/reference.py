"""Command `make reference`: keep the present results as those of the authors, for docs to quote.

`python -m stages.tools.reference` copies metrics/{summary,quality,quantize,index} of the recipes of
params.yaml, and this machine's timings where there are any, into metrics/reference/, and says in
machine.json on which machine and from which parameters they come. ``--keep-times`` keeps the
timings that are there: those of a machine that has other work say little. No run of the pipeline writes
there, so results of your own never change what the docs quote.
"""

import argparse
import datetime
import logging
from typing import Any

from colqwen3.release.provenance import shown_params
from colqwen3.system.errors import run
from colqwen3.system.files import fresh_folder, publish_folder, read_json, write_json
from stages.checking.params import Params
from stages.evaluation.speed import read_speed
from stages.pipeline.params import load_params
from stages.pipeline.paths import (
    CHECKPOINTS,
    INDEX_METRICS,
    QUALITY_METRICS,
    QUANTIZE_METRICS,
    REFERENCE,
    SUMMARIES,
)

logger = logging.getLogger(__name__)

MACHINE = "machine.json"
COPIED = (SUMMARIES, QUALITY_METRICS, QUANTIZE_METRICS, INDEX_METRICS)


def describe_params(params: Params) -> dict[str, Any]:
    """Return the parameters that figures depend on, without a path of this machine."""
    shown: dict[str, Any] = shown_params(
        params.model_dump(include={"model", "calibration", "recipes", "embed", "evaluate"})
    )
    return shown


def main() -> None:
    """Write metrics/reference/."""
    parser = argparse.ArgumentParser(prog="python -m stages.tools.reference", description=__doc__)
    parser.add_argument("--keep-times", action="store_true", help="keep the timings that are there")
    keep_times = parser.parse_args().keep_times
    params = load_params(Params)
    results: dict[str, Any] = {}
    for recipe in params.recipes:
        for folder in COPIED:
            fix = f"run `dvc repro evaluate@{recipe}`"
            results[f"{folder.name}/{recipe}.json"] = read_json(folder / f"{recipe}.json", fix)
        name = f"speed/{recipe}.json"
        if keep_times and (REFERENCE / name).exists():
            results[name] = read_json(REFERENCE / name, "run without --keep-times")
        elif not keep_times and (speed := read_speed(recipe, CHECKPOINTS / recipe)):
            results[name] = speed

    import torch

    from colqwen3.system.device import choose_device, device_name

    results[MACHINE] = {
        "device": device_name(choose_device(params.compute.device)),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "params": describe_params(params),
    }
    partial = fresh_folder(REFERENCE)
    for name, value in results.items():
        write_json(partial / name, value)
    publish_folder(partial, REFERENCE)
    logger.info("%s holds the results of %s", REFERENCE, ", ".join(params.recipes))


if __name__ == "__main__":
    run(main)
