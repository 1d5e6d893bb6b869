"""The quantized checkpoint: one file of known size, filled as results come, then checked.

No method ever holds the model: plain rounding streams linear by linear, AutoRound and GPTQ go
decoder layer by decoder layer. Every byte outside the planned linears is copied from the source.
"""

import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.headers import (
    DTYPE_BYTES,
    INDEX,
    SINGLE,
    Checkpoint,
    read_headers,
    weight_files,
)
from colqwen3.checkpoint.layout import BLOCKS, VISION, all_linears, component, published_name
from colqwen3.checkpoint.tensor_file import Spec, TensorFile, same_bytes
from colqwen3.system.disk import check_space
from colqwen3.system.errors import UserError
from colqwen3.system.files import digest_files, read_json, write_json
from colqwen3.system.resume import surroundings
from stages.pipeline.stage import code_digest
from stages.quantization.linears import Filled, Job, Linears, round_linears, tune_linears
from stages.quantization.recipes import AnyRecipe, RtnRecipe, check_group_size

LIBRARIES = ("auto-round", "torch", "transformers", "safetensors", "numpy")
FIX = "run `dvc repro -f`"


def planned_linears(name: str, recipe: AnyRecipe, manifest: dict[str, Any]) -> Linears:
    """Return the linears that a recipe quantizes.

    Raises
    ------
    UserError
        If the recipe's group size does not divide the inputs of one of them.
    """
    linears: Linears = manifest["linears"]
    if recipe.vision_too:
        linears = {key: list(shape) for key, shape in all_linears(manifest["config"]).items()}
    check_group_size(name, recipe, linears)
    return linears


def plan(source: Checkpoint, linears: Linears, recipe: AnyRecipe) -> dict[str, Spec]:
    """Return dtype and shape of every tensor of the checkpoint to make."""
    specs: dict[str, Spec] = {}
    for name, tensor in source.tensors.items():
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


def make_checkpoint(job: Job) -> tuple[Path, Filled]:
    """Make the checkpoint in the scratch; return its folder and what filling it tells.

    Raises
    ------
    UserError
        If a weight is not finite, a sample is lost, or the result is not as planned.
    DiskFullError
        If the disk has no room for it.
    """
    source, scratch = job.source, job.scratch
    specs = plan(source, job.linears, job.recipe)
    tokens = sum(sample["input_ids"].numel() for sample in job.samples)
    needed = maximum_bytes(specs, read_json(source.folder / "config.json", FIX), tokens)
    check_space(scratch.folder, max(0, needed - scratch.bytes()), "the checkpoint")
    folder = scratch.folder / "checkpoint"
    folder.mkdir(exist_ok=True)
    fill = round_linears if isinstance(job.recipe, RtnRecipe) else tune_linears
    with TensorFile(folder / SINGLE, specs) as file:
        filled = fill(job, file)
        for name, tensor in source.tensors.items():
            if name.removesuffix(".weight") not in job.linears:
                file.copy(name, source.folder, tensor)
    write_configs(source.folder, folder, job.recipe)
    return folder, filled


def write_configs(source: Path, target: Path, recipe: AnyRecipe) -> None:
    """Write config.json with its ``quantization_config``; copy tokenizer and processor files.

    All else in config.json is the source's own, so that published field names stay. Python files
    are not copied and ``auto_map``, which names them, is dropped: nothing in the result runs code
    from the source.
    """
    config = read_json(source / "config.json", FIX)
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "block_name_to_quantize": f"{BLOCKS},{VISION}" if recipe.vision_too else BLOCKS,
        "autoround_version": version("auto-round"),
        **recipe.model_dump(include={"bits", "group_size", "sym", "iters", "lr", "seed"}),
    }
    config.pop("auto_map", None)
    write_json(target / "config.json", config)
    for path in sorted(source.iterdir()):
        if path.name in ("config.json", INDEX) or not path.is_file():
            continue
        if path.suffix == ".json" and "auto_map" in (content := read_json(path, FIX)):
            write_json(target / path.name, {k: v for k, v in content.items() if k != "auto_map"})
        elif path.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(path, target / path.name)


def check_checkpoint(folder: Path, job: Job) -> None:
    """Check a finished checkpoint against the source and the plan.

    Raises
    ------
    UserError
        Naming the first tensor that is not as planned, or not the source's own byte for byte.
    """
    source, stored = job.source, read_headers(folder)
    planned = plan(source, job.linears, job.recipe)
    for name in sorted(planned.keys() ^ stored.keys()):
        problem = "is missing" if name in planned else "was not planned"
        raise UserError(f"{folder}: {name} {problem}; {FIX}")
    for name, tensor in stored.items():
        if (tensor.dtype, tensor.shape) != planned[name]:
            raise UserError(f"{folder}: {name} has another dtype or shape than planned; {FIX}")
        original = source.tensors.get(name)
        if original and not same_bytes(source.folder, original, folder, tensor):
            raise UserError(f"{folder}: {name} is not planned for quantization, but changed")


def count_bytes(folder: Path) -> dict[str, Any]:
    """Return the bytes of the tensors of each component and of the safetensors files."""
    components: dict[str, int] = {}
    for name, tensor in read_headers(folder).items():
        part = component(published_name(name))
        components[part] = components.get(part, 0) + tensor.nbytes
    files = sum(path.stat().st_size for path in weight_files(folder))
    return {"components": components, "files": files}


def maximum_bytes(specs: dict[str, Spec], config: dict[str, Any], tokens: int) -> int:
    """Return the most bytes that making a checkpoint writes.

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
    recipe: AnyRecipe, manifest: dict[str, Any], calibration: Path, device: torch.device
) -> dict[str, Any]:
    """Return everything that determines the checkpoint, to the last bit, as a JSON value."""
    return {
        "recipe": recipe.model_dump(),
        "source": manifest["files"],
        "calibration": digest_files(calibration, calibration.iterdir()),
        **surroundings(code_digest("quantize"), device, LIBRARIES),
    }


def layer_order(name: str) -> tuple[bool, int, str]:
    """Return the key that sorts linears by decoder layer; those of other parts come last."""
    inside = name.startswith(f"{BLOCKS}.")
    number, _, module = name.removeprefix(f"{BLOCKS}.").partition(".")
    return (False, int(number), module) if inside else (True, 0, name)
