"""Stage `quantize@<recipe>`: the linears of the language model in 2 to 8 bits, all else untouched.

AutoRound: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", arXiv:2309.05516.
Neither method ever holds the model: plain rounding streams linear by linear, AutoRound tunes
decoder layer by decoder layer. The checkpoint is one file whose size is known beforehand, filled
as results come; every byte outside the planned linears is copied from the source.
"""

import argparse
import logging
import math
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stages.checkpoint import (
    DTYPE_BYTES,
    INDEX,
    SINGLE,
    TensorInfo,
    read_headers,
    read_used_headers,
    weight_files,
)
from stages.compute import choose_device, make_deterministic
from stages.errors import PipelineError, disk_is_full, run
from stages.files import publish_folder, read_json, write_json
from stages.fill import Linears, Recipe, round_linears, tune_linears
from stages.layout import BLOCKS, VISION, all_linears, component, published_name
from stages.lock import claim
from stages.manifest import find_inspected_model, read_manifest
from stages.params import Params, RtnRecipe, load_params
from stages.paths import CALIBRATION, CHECKPOINTS, PLOTS, QUANTIZE_METRICS, SCRATCH
from stages.samples import read_samples
from stages.scratch import Scratch, digest_files, surroundings, work_key
from stages.space import check_space
from stages.tensors import Spec, TensorFile, same_bytes
from stages.tuning import Sample

logger = logging.getLogger(__name__)

LIBRARIES = ("auto-round", "torch", "transformers", "safetensors", "numpy")
MEND = "run `dvc repro -f`"
FOLDERS = re.compile(r"(?<![\w.])/(?:[^/\s:]+/)+")
"""The folders of an absolute path: metrics must not tell of the machine."""


def check_group_size(name: str, group_size: int, linears: Linears) -> None:
    """Refuse a group size that does not divide the inputs of every planned linear.

    Raises
    ------
    PipelineError
        Naming the recipe and the first linear that does not fit.
    """
    for linear, (_, in_features) in linears.items():
        if in_features % group_size:
            raise PipelineError(
                f"params.yaml: recipes.{name}.group_size is {group_size}, which does not divide the "
                f"{in_features} inputs of {linear}; choose a smaller one"
            )


def plan(stored: dict[str, TensorInfo], linears: Linears, recipe: Recipe) -> dict[str, Spec]:
    """Return dtype and shape of every tensor of the checkpoint to make."""
    specs: dict[str, Spec] = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if module not in linears:
            specs[name] = (tensor.dtype, tensor.shape)
            continue
        out_features, in_features = linears[module]
        groups, words = in_features // recipe.group_size, recipe.bits / 32
        specs[f"{module}.qweight"] = ("I32", (round(in_features * words), out_features))
        specs[f"{module}.qzeros"] = ("I32", (groups, round(out_features * words)))
        specs[f"{module}.scales"] = ("F16", (groups, out_features))
    return specs


def make_checkpoint(
    source: Path,
    linears: Linears,
    recipe: Recipe,
    samples: Sequence[Sample],
    device: torch.device,
    scratch: Scratch,
) -> tuple[Path, dict[str, float]]:
    """Make the checkpoint in the scratch; return its folder and the linears' relative errors.

    Raises
    ------
    PipelineError
        If a weight is not finite, a sample is lost, or the result is not as planned.
    """
    stored = read_used_headers(source)
    specs = plan(stored, linears, recipe)
    tokens = sum(sample["input_ids"].numel() for sample in samples)
    needed = most_bytes(specs, read_json(source / "config.json", MEND), tokens)
    there = sum(path.stat().st_size for path in scratch.folder.rglob("*") if path.is_file())
    check_space(scratch.folder, max(0, needed - there), "the checkpoint")
    folder = scratch.folder / "checkpoint"
    folder.mkdir(exist_ok=True)
    with TensorFile(folder / SINGLE, specs) as file:
        if isinstance(recipe, RtnRecipe):
            errors = round_linears(source, stored, linears, recipe, file)
        else:
            errors = tune_linears(source, stored, linears, recipe, samples, device, file, scratch)
        for name, tensor in stored.items():
            if name.removesuffix(".weight") not in linears:
                file.copy(name, source, tensor)
    write_configs(source, folder, recipe)
    return folder, errors


def write_configs(source: Path, target: Path, recipe: Recipe) -> None:
    """Write config.json with its ``quantization_config``; copy tokenizer and processor files.

    All else in config.json is the source's own, so that published field names stay. Python files
    are not copied and ``auto_map``, which names them, is dropped: nothing in the result runs code
    from the source.
    """
    vision_too = isinstance(recipe, RtnRecipe) and recipe.linears == "all"
    config = read_json(source / "config.json", MEND)
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "block_name_to_quantize": f"{BLOCKS},{VISION}" if vision_too else BLOCKS,
        "autoround_version": version("auto-round"),
        **recipe.model_dump(include={"bits", "group_size", "sym", "iters", "lr", "seed"}),
    }
    config.pop("auto_map", None)
    write_json(target / "config.json", config)
    for path in sorted(source.iterdir()):
        if path.name in ("config.json", INDEX) or not path.is_file():
            continue
        if path.suffix == ".json" and "auto_map" in (read := read_json(path, MEND)):
            write_json(target / path.name, {k: v for k, v in read.items() if k != "auto_map"})
        elif path.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(path, target / path.name)


def check_checkpoint(folder: Path, source: Path, linears: Linears, recipe: Recipe) -> None:
    """Check a finished checkpoint against the source and the plan.

    Raises
    ------
    PipelineError
        Naming the first tensor that is not as planned, or not the source's own byte for byte.
    """
    stored, made = read_used_headers(source), read_headers(folder)
    planned = plan(stored, linears, recipe)
    for name in sorted(planned.keys() ^ made.keys()):
        problem = "is missing" if name in planned else "was not planned"
        raise PipelineError(f"{folder}: {name} {problem}; {MEND}")
    for name, tensor in made.items():
        if (tensor.dtype, tensor.shape) != planned[name]:
            raise PipelineError(f"{folder}: {name} has another dtype or shape than planned; {MEND}")
        if name in stored and not same_bytes(source, stored[name], folder, tensor):
            raise PipelineError(f"{folder}: {name} is not planned for quantization, but changed")


def _layer_order(name: str) -> tuple[bool, int, str]:
    inside = name.startswith(f"{BLOCKS}.")
    number, _, module = name.removeprefix(f"{BLOCKS}.").partition(".")
    return (False, int(number), module) if inside else (True, 0, name)


def count_bytes(folder: Path) -> dict[str, Any]:
    """Return the bytes of the tensors of each component and of the safetensors files."""
    parts: dict[str, int] = {}
    for name, tensor in read_headers(folder).items():
        part = component(published_name(name))
        parts[part] = parts.get(part, 0) + tensor.nbytes
    files = sum(path.stat().st_size for path in weight_files(folder))
    return {"components": parts, "files": files}


def most_bytes(specs: dict[str, Spec], config: dict[str, Any], tokens: int) -> int:
    """Return what making a checkpoint writes at most.

    Parameters
    ----------
    specs
        Its tensors.
    config
        Of the source model.
    tokens
        Of all calibration samples. Their hidden states are kept in float32 at most: as inputs of
        the first layer with the deepstack features, and those of two layers' chain, each in full
        precision and quantized.
    """
    weights = sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in specs.values())
    states = 1 + len(config["vision_config"]["deepstack_visual_indexes"]) + 4
    return int(weights) + 4 * tokens * states * int(config["text_config"]["hidden_size"])


def determinants(
    recipe: Recipe, manifest: dict[str, Any], calibration: Path, device: torch.device
) -> dict[str, Any]:
    """Return everything that determines the checkpoint, to the last bit, as a JSON value."""
    return {
        "recipe": recipe.model_dump(exclude={"format", "fallback"}),
        "source": manifest["files"],
        "calibration": digest_files(calibration, calibration.iterdir()),
        **surroundings(device, LIBRARIES),
    }


class RecipeFailedError(Exception):
    """A recipe failed at its work, by its own doing: what its ``fallback`` is for."""


def planned_linears(name: str, recipe: Recipe, manifest: dict[str, Any]) -> Linears:
    """Return the linears that a recipe quantizes.

    Raises
    ------
    PipelineError
        If the recipe's group size does not fit one of them.
    """
    linears: Linears = manifest["linears"]
    if isinstance(recipe, RtnRecipe) and recipe.linears == "all":
        linears = {key: list(shape) for key, shape in all_linears(manifest["config"]).items()}
    check_group_size(name, recipe.group_size, linears)
    return linears


def quantize(
    name: str,
    ran: str,
    params: Params,
    manifest: dict[str, Any],
    source: Path,
    reason: str | None = None,
) -> None:
    """Make artifacts/checkpoints/<name> and its metrics by the recipe called `ran`.

    Parameters
    ----------
    name
        The recipe whose stage this is.
    ran
        The same, or its fallback.
    params, manifest, source
        Of the pipeline.
    reason
        Why the recipe itself failed, where `ran` is its fallback.

    Raises
    ------
    PipelineError
        If inputs are missing or damaged, or another process makes the same recipe.
    RecipeFailedError
        If the recipe itself cannot be done: out of memory, samples lost, weights not finite, or a
        result that is not as planned.
    """
    recipe = params.recipe(ran)
    linears = planned_linears(ran, recipe, manifest)
    device = choose_device(params.compute.device)
    calibration = CALIBRATION / recipe.calibration
    origins, samples = read_samples(calibration)
    found = determinants(recipe, manifest, calibration, device)
    # a failed recipe keeps its work: mended, it goes on there
    work = SCRATCH / (name if ran == name else f"{name}.fallback")
    with Scratch(work, work_key(found)) as scratch:
        try:
            partial, errors = make_checkpoint(source, linears, recipe, samples, device, scratch)
            check_checkpoint(partial, source, linears, recipe)
        except Exception as error:
            if disk_is_full(error):
                raise
            raise RecipeFailedError(str(error)) from error
        metrics = {
            "recipe": {
                "ran": ran,
                "values": recipe.model_dump(),
                **({"instead_of": name, "because": reason} if reason else {}),
            },
            "libraries": found["versions"],
            "bytes": count_bytes(partial),
            "linears": {"planned": len(linears), "quantized": len(errors)},
            "calibration": {
                "set": recipe.calibration,
                "sha256": found["calibration"],
                "samples": len(samples),
                "queries": sum(origin.kind == "query" for origin in origins),
                "pages": sum(origin.kind == "page" for origin in origins),
                "passages": sum(origin.kind == "passage" for origin in origins),
                "tokens": sum(origin.tokens for origin in origins),
            },
            "relative_weight_error": {
                "mean": round(sum(errors.values()) / len(errors), 6),
                "max": round(max(errors.values()), 6),
            },
        }
        write_json(QUANTIZE_METRICS / f"{name}.json", metrics)
        layers = [
            {"layer": layer.removeprefix(BLOCKS + "."), "error": round(errors[layer], 6)}
            for layer in sorted(errors, key=_layer_order)
        ]
        write_json(PLOTS / name / "layers.json", layers)
        publish_folder(partial, CHECKPOINTS / name)
        scratch.remove()


def main() -> None:
    """Make artifacts/checkpoints/<recipe> and its metrics."""
    parser = argparse.ArgumentParser(prog="python -m stages.quantize", description=__doc__)
    parser.add_argument("recipe", help="name of a recipe in params.yaml")
    name = parser.parse_args().recipe

    params = load_params()
    fallback = params.recipe(name).fallback
    claim(f"quantize@{name}")
    manifest = read_manifest()
    source = find_inspected_model(params.model, manifest)
    if fallback:  # a mistake in it shows now, not after hours
        planned_linears(fallback, params.recipe(fallback), manifest)
    make_deterministic()
    try:
        quantize(name, name, params, manifest, source)
    except RecipeFailedError as error:
        cause = error.__cause__ or error
        if fallback is None:
            raise cause from None
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        reason = FOLDERS.sub("", reason)
        logger.warning(
            "recipe %s failed (%s); %s, its fallback, runs instead", name, reason, fallback
        )
        quantize(name, fallback, params, manifest, source, reason)


if __name__ == "__main__":
    run(main)
