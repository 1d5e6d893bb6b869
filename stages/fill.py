"""Fills the quantized linears of a checkpoint file, rounded to nearest or tuned by AutoRound."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from stages.checkpoint import TensorInfo
from stages.errors import PipelineError
from stages.layout import BLOCKS
from stages.packing import PARTS, pack, relative_error, restore_codes, round_to_nearest
from stages.params import AutoRoundRecipe, RtnRecipe
from stages.progress import Progress
from stages.scratch import Scratch
from stages.tensors import TensorFile, read_tensor
from stages.tuning import Sample, check_quantized, tune_blocks

logger = logging.getLogger(__name__)

Recipe = AutoRoundRecipe | RtnRecipe
Linears = dict[str, list[int]]
"""Name -> [out_features, in_features]."""
Made = tuple[str, dict[str, torch.Tensor], float]
"""A linear's name, its packed tensors, and the relative error of its weight."""


def round_linears(
    source: Path, stored: dict[str, TensorInfo], linears: Linears, recipe: Recipe, file: TensorFile
) -> dict[str, float]:
    """Round the planned linears to nearest, and fill them into `file`.

    As many linears are in memory as torch may use threads, one thread each: that is faster than
    several threads on one linear, most of all on a busy machine. Returns the relative error of
    each linear's weight.

    Raises
    ------
    PipelineError
        If a weight is NaN, infinite or too large for a float16 scale.
    """

    def work(name: str) -> float:
        weight = read_tensor(source, stored[f"{name}.weight"])
        codes, scales = round_to_nearest(weight, recipe.bits, recipe.group_size)
        if not scales.isfinite().all():
            raise PipelineError(
                f"{source}: {name}.weight holds NaN, infinite or huge weights; "
                "fetch the model again"
            )
        write_parts(file, name, pack(codes, scales, recipe.bits))
        return relative_error(weight, codes, scales)

    threads = torch.get_num_threads()
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        Progress("linears", len(linears)) as progress,
    ):
        errors = {}
        try:
            for name, error in zip(linears, pool.map(work, linears), strict=True):
                errors[name] = error
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return errors


def pack_block(
    block: torch.nn.Module,
    prefix: str,
    names: Sequence[str],
    source: Path,
    stored: dict[str, TensorInfo],
    bits: int,
    device: torch.device,
) -> Iterator[Made]:
    """Pack the linears of a decoder layer that AutoRound has rounded, on `device`.

    Raises
    ------
    PipelineError
        If AutoRound left weights that are no multiples of their scale.
    """
    for name in names:
        module: Any = block.get_submodule(name.removeprefix(prefix))
        scales = module.scale.detach().to(device, torch.float16).view(module.weight.shape[0], -1)
        codes, gap = restore_codes(module.weight.detach().to(device), scales, bits)
        if not gap < 0.4:  # a 16-bit weight is a rounded multiple; NaN is none
            raise PipelineError(f"quantize: {name} came back from AutoRound without whole codes")
        weight = read_tensor(source, stored[f"{name}.weight"]).to(device)
        yield name, pack(codes, scales, bits), relative_error(weight, codes, scales)


def tune_linears(
    source: Path,
    stored: dict[str, TensorInfo],
    linears: Linears,
    recipe: AutoRoundRecipe,
    samples: Sequence[Sample],
    device: torch.device,
    file: TensorFile,
    scratch: Scratch,
) -> dict[str, float]:
    """Fill the planned linears of `file` with AutoRound, going on where `scratch` stands.

    Returns the relative error of each linear's weight.

    Raises
    ------
    PipelineError
        If a sample is lost, or another set of linears was quantized than planned.
    """
    from stages.colqwen3.blocks import load_block, load_front
    from stages.colqwen3.deepstack import fold_deepstack, fold_into_layer
    from stages.colqwen3.loading import load_source_dtype
    from stages.colqwen3.packed import attend_within_samples

    # AutoRound tunes in float32 on a CPU, in the stored dtype on a GPU
    dtype = torch.float32 if device.type == "cpu" else load_source_dtype(source)

    def front() -> Any:
        model = load_front(source, dtype, device)
        if recipe.deepstack:
            fold_deepstack(model)
        return model

    def layer(model: Any, index: int) -> torch.nn.Module:
        block: torch.nn.Module = load_block(source, stored, model, index, dtype)
        if recipe.deepstack:
            fold_into_layer(block, index)
        if recipe.batch_size > 1:
            attend_within_samples(block)
        return block

    blocks = split_by_block(linears)
    for index, step in enumerate(scratch.steps):
        if block_digest(file, blocks[index]) != step["sha256"]:
            scratch.forget(f"layer {index} in it is damaged")
            break
    if scratch.steps:
        logger.info("going on after layer %d of %d", len(scratch.steps), len(blocks))
    tuned = tune_blocks(samples, recipe, device, scratch, front, layer, len(blocks))
    for index, block, files in tuned:
        names = blocks[index]
        prefix = f"{BLOCKS}.{index}."
        check_quantized(block, index, {name.removeprefix(prefix) for name in names})
        errors = {}
        for name, parts, error in pack_block(
            block, prefix, names, source, stored, recipe.bits, device
        ):
            write_parts(file, name, parts)
            errors[name] = error
        scratch.keep(files, {"sha256": block_digest(file, names), "errors": errors})
    return {name: error for step in scratch.steps for name, error in step["errors"].items()}


def split_by_block(linears: Linears) -> list[list[str]]:
    """Return the names of the planned linears of each decoder layer."""
    blocks: dict[int, list[str]] = {}
    for name in linears:
        index = name.removeprefix(f"{BLOCKS}.").partition(".")[0]
        blocks.setdefault(int(index), []).append(name)
    return [blocks[index] for index in sorted(blocks)]


def write_parts(file: TensorFile, name: str, parts: dict[str, torch.Tensor]) -> None:
    """Write the packed tensors of one linear."""
    for part, tensor in parts.items():
        file.write(f"{name}.{part}", tensor)


def block_digest(file: TensorFile, names: Sequence[str]) -> str:
    """Return the SHA-256 of the packed tensors of linears as they stand in the file."""
    digest = hashlib.sha256()
    for name in names:
        for part in PARTS:
            digest.update(file.read(f"{name}.{part}"))
    return digest.hexdigest()
