"""Stage `release@<recipe>`: the checkpoint as a folder for people who have never seen this project.

Weights, configs, model code, licence, model card, and quantization_metadata.json, which
`python -m stages.verify` checks the folder against.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from stages.card import (
    REQUIREMENTS,
    describe_calibration,
    describe_fallback,
    describe_method,
    read_source_card,
    write_card,
)
from stages.checkpoint import model_files, weight_files
from stages.errors import PipelineError, run
from stages.files import fresh_folder, publish_folder, read_json, write_json
from stages.formats import export_weights
from stages.lock import claim
from stages.manifest import find_inspected_model, read_manifest
from stages.params import Params, load_params
from stages.paths import (
    CHECKPOINTS,
    MANIFEST,
    METRICS,
    QUANTIZE_METRICS,
    RELEASES,
    SPEED_METRICS,
)
from stages.provenance import (
    FORMAT_VERSION,
    METADATA,
    describe_files,
    layer_table,
    pipeline_commit,
    seal,
    shown_params,
    shown_path,
)
from stages.scratch import digest_file
from stages.space import check_space

LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")


def copy_checkpoint(checkpoint: Path, folder: Path, weights: bool) -> None:
    """Put a checkpoint's files into another folder; weights as hard links where the disk has them."""
    for path in model_files(checkpoint):
        target = folder / path.name
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target)
            continue
        if not weights:
            continue
        try:
            os.link(path.resolve(), target)
        except OSError:  # another filesystem, or one without links
            shutil.copyfile(path, target)


def copy_licences(source: Path, folder: Path) -> list[str]:
    """Copy the licence files of the source model; return their names."""
    found = {
        path.name: path
        for pattern in LICENCES
        for path in source.glob(pattern)
        if path.is_file() and path.suffix in ("", ".txt", ".md")
    }
    for name, path in sorted(found.items()):
        shutil.copyfile(path, folder / name)
    return sorted(found)


def describe_making(
    name: str, params: Params, quantized: dict[str, Any], source_card: dict[str, Any]
) -> dict[str, Any]:
    """Return the metadata that say how the checkpoint was made, without those of its files.

    Parameters
    ----------
    name
        Of the recipe.
    params
        Of the pipeline.
    quantized
        metrics/quantize/<recipe>.json.
    source_card
        Metadata of the source model's card.
    """
    values = quantized["recipe"]["values"]
    config = read_json(CHECKPOINTS / name / "config.json", f"run `dvc repro -f quantize@{name}`")
    shown = params.model_dump(include={"model", "embed", "evaluate"})
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "repo": shown_path(params.model.source),
            "on_hub": not Path(params.model.source).expanduser().is_dir(),
            "revision": params.model.revision,
            "manifest_sha256": digest_file(MANIFEST),
            "license": source_card.get("license"),
        },
        "recipe": {"name": name, **quantized["recipe"]},
        "seed": values.get("seed"),
        "calibration": quantized["calibration"],
        "params": shown_params(shown),
        "format": values["format"],
        "layers": layer_table(CHECKPOINTS / name, config["quantization_config"]["bits"]),
        "libraries": quantized["libraries"],
        "pipeline": pipeline_commit(),
    }


def card_facts(
    making: dict[str, Any],
    metrics: dict[str, Any],
    model: dict[str, Any],
    device: str,
    licences: list[str],
) -> dict[str, Any]:
    """Return the variables of the card's template; figures come from `metrics`."""
    recipe, params = making["recipe"], making["params"]
    values, data = recipe["values"], metrics["data"]
    libraries = {"auto-round", "torch", "transformers"} & making["libraries"].keys()
    dataset, source = params["evaluate"]["dataset"], Path(making["source"]["repo"])
    on_hub = making["source"]["on_hub"]
    vision_too = values.get("linears") == "all"
    return {
        "recipe": recipe["name"],
        "metrics": metrics,
        "metadata": METADATA,
        "title": f"{source.name if on_hub else '-'.join(source.parts)}-{recipe['name']}",
        "base_model": str(source),
        "on_hub": on_hub,
        "revision": making["source"]["revision"],
        "parameters": f"{model['total']['parameters']:,}",
        "bits": values["bits"],
        "group_size": values["group_size"],
        "layers": len(making["layers"]),
        "format": making["format"],
        "requirements": REQUIREMENTS[making["format"]],
        "fallback": describe_fallback(recipe),
        "quantized_part": "language model and vision tower" if vision_too else "language model",
        "visual_too": vision_too,
        "method": describe_method(values),
        "calibration": describe_calibration(making["calibration"]),
        "libraries": ", ".join(f"{key} {making['libraries'][key]}" for key in sorted(libraries)),
        "max_num_visual_tokens": params["model"]["max_num_visual_tokens"],
        "dataset": dataset,
        "measured_on": f"{data['pages']} pages and {data['queries']} queries of {dataset} "
        f"({params['embed']['dtype']}, {device})",
        "licence_files": licences,
    }


def main() -> None:
    """Make artifacts/release/<recipe>."""
    from stages.colqwen3.shipping import ship_code, ship_sentence_transformers

    parser = argparse.ArgumentParser(prog="python -m stages.release", description=__doc__)
    parser.add_argument("recipe", help="name of a recipe in params.yaml")
    name = parser.parse_args().recipe

    params = load_params()
    params.recipe(name)
    claim(f"release@{name}")
    source = find_inspected_model(params.model, read_manifest())
    metrics, quantized, speed, model = (
        read_json(path, "run `dvc repro`")
        for path in (
            METRICS / f"{name}.json",
            QUANTIZE_METRICS / f"{name}.json",
            SPEED_METRICS / f"{name}.json",
            METRICS / "model.json",
        )
    )
    if not {"recipe", "libraries"} <= quantized.keys():
        raise PipelineError(
            f"{QUANTIZE_METRICS / name}.json: does not say how the checkpoint was made; "
            f"run `dvc repro quantize@{name}`"
        )
    source_card = read_source_card(source)
    partial = fresh_folder(RELEASES / name)
    kind = quantized["recipe"]["values"]["format"]
    copy_checkpoint(CHECKPOINTS / name, partial, weights=kind == "auto_round")
    if kind != "auto_round":
        check_space(
            partial,
            sum(path.stat().st_size for path in weight_files(CHECKPOINTS / name)),
            "the weights",
        )
        export_weights(CHECKPOINTS / name, partial, kind)
    ship_code(partial)
    ship_sentence_transformers(partial)
    licences = copy_licences(source, partial)
    making = describe_making(name, params, quantized, source_card)
    facts = card_facts(making, metrics, model, speed["setting"]["device"], licences)
    write_card(partial, source_card, facts)
    write_json(partial / METADATA, seal({**making, **describe_files(partial)}))
    publish_folder(partial, RELEASES / name)


if __name__ == "__main__":
    run(main)
