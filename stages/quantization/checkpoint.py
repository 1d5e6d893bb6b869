"""The quantized checkpoint: one file of known size, filled as results come, then checked.

No method ever holds the model: plain rounding streams linear by linear, AutoRound and GPTQ go
decoder layer by decoder layer; only end-to-end tuning and GPTQ by the whole model, if asked for, have
all decoder layers in memory. Every byte outside the planned linears is copied from the source.
"""

import shutil
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.headers import (
    INDEX,
    SINGLE,
    Spec,
    read_headers,
    weight_files,
)
from colqwen3.checkpoint.layout import BLOCKS, EMBEDDINGS_KEY, component, published_name
from colqwen3.checkpoint.tensor_file import TensorFile, same_bytes
from colqwen3.system.disk import check_space
from colqwen3.system.errors import UserError
from colqwen3.system.files import digest_files, read_json, write_json
from colqwen3.system.resume import surroundings
from stages.pipeline.stage import code_digest
from stages.quantization.allocation import SIXTEEN, Allocation, bytes_of, planned_tensors
from stages.quantization.end_to_end import hold_back
from stages.quantization.linears import Filled, Job, fill
from stages.quantization.model_hessians import effects_bytes
from stages.quantization.recipes import AnyRecipe, GptqRecipe, RtnRecipe
from stages.quantization.whole_model import find_effects, finish, restore

LIBRARIES = ("auto-round", "torch", "transformers", "safetensors", "numpy")
FIX = "run `dvc repro -f`"


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
    specs = planned_tensors(source.tensors, job.allocation, job.recipe.group_size)
    tokens = sum(sample["input_ids"].numel() for sample in job.samples)
    needed = maximum_bytes(specs, read_json(source.folder / "config.json", FIX), tokens)
    if not isinstance(job.recipe, RtnRecipe) and job.recipe.end_to_end:
        hold_back(job.kinds)  # one sample of a kind is an error, now and not after all layers
        needed += bytes_of(spec for name, spec in specs.items() if name not in source.tensors)
    if isinstance(job.recipe, GptqRecipe) and job.recipe.hessian == "model":
        outputs = [source.tensors[f"{name}.weight"].shape[0] for name in job.allocation.text]
        needed += effects_bytes(outputs, tokens)
    check_space(scratch.folder, max(0, needed - scratch.bytes()), "the checkpoint")
    folder = scratch.folder / "checkpoint"
    folder.mkdir(exist_ok=True)
    with TensorFile(folder / SINGLE, specs) as file:
        restore(job, file)
        filled = finish(job, file, fill(job, file, find_effects))
        for name, tensor in source.tensors.items():
            if name.removesuffix(".weight") not in job.allocation.modules:
                file.copy(name, source.folder, tensor)
    write_configs(source.folder, folder, job.recipe, job.allocation)
    return folder, filled


def write_configs(source: Path, target: Path, recipe: AnyRecipe, allocation: Allocation) -> None:
    """Write config.json with its ``quantization_config``; copy tokenizer and processor files.

    ``bits`` there are those of most linears of the language model; ``extra_config`` gives, as
    AutoRound does, those of every other quantized linear.

    All else in config.json is the source's own, so that published field names stay. Python files
    are not copied and ``auto_map``, which names them, is dropped: nothing in the result runs code
    from the source.
    """
    config = read_json(source / "config.json", FIX)
    inside = Counter(allocation.linears[name] for name in allocation.text)
    most = max(inside, key=lambda bits: (inside[bits], bits))
    own = {
        name: {"bits": bits, "group_size": recipe.group_size, "sym": recipe.sym, "data_type": "int"}
        for name, bits in allocation.linears.items()
        if bits != most or name in allocation.vision
    }
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "block_name_to_quantize": BLOCKS,
        "autoround_version": version("auto-round"),
        "bits": most,
        **recipe.model_dump(include={"group_size", "sym", "iters", "lr", "seed"}),
        **({"extra_config": own} if own else {}),
    }
    if allocation.token_embeddings < SIXTEEN:
        config[EMBEDDINGS_KEY] = {
            "bits": allocation.token_embeddings,
            "group_size": recipe.group_size,
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
    planned = planned_tensors(source.tensors, job.allocation, job.recipe.group_size)
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
    states = 1 + len(config["vision_config"]["deepstack_visual_indexes"]) + 4
    return bytes_of(specs.values()) + 4 * tokens * states * int(
        config["text_config"]["hidden_size"]
    )


def determinants(
    recipe: AnyRecipe,
    allocation: Allocation,
    manifest: dict[str, Any],
    calibration: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Return everything that determines the checkpoint, to the last bit, as a JSON value."""
    return {
        "recipe": recipe.model_dump(),
        "allocation": asdict(allocation),
        "source": manifest["files"],
        "calibration": digest_files(calibration, calibration.iterdir()),
        **surroundings(code_digest("quantize"), device, LIBRARIES),
    }


def layer_order(name: str) -> tuple[bool, int, str]:
    """Return the key that sorts linears by decoder layer; those of other parts come last."""
    inside = name.startswith(f"{BLOCKS}.")
    number, _, module = name.removeprefix(f"{BLOCKS}.").partition(".")
    return (False, int(number), module) if inside else (True, 0, name)
