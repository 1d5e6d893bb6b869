"""Fills the quantized linears of a checkpoint file, rounded to nearest or tuned layer by layer."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import BLOCKS
from colqwen3.checkpoint.packing import (
    PACKED_TENSORS,
    pack,
    relative_error,
    restore_codes,
    round_to_nearest,
)
from colqwen3.checkpoint.tensor_file import TensorFile, read_tensor
from colqwen3.system.errors import NonFiniteWeightsError, UserError
from colqwen3.system.progress import Progress
from colqwen3.system.resume import Scratch
from stages.quantization.activations import Sample
from stages.quantization.recipes import AnyRecipe, RtnRecipe
from stages.quantization.tuning import Outcome, check_quantized, tune_layers

logger = logging.getLogger(__name__)

MAX_GAP = 0.4
"""Steps that a 16-bit weight may be away from a whole code after tuning; half a step is no code."""

Linears = dict[str, list[int]]
"""Name -> [out_features, in_features]."""


@dataclass(frozen=True)
class Job:
    """One checkpoint to make.

    Attributes
    ----------
    source
        The original model.
    linears
        The linears to quantize.
    recipe
        How.
    samples
        Calibration samples, each the arguments of one forward; empty for plain rounding.
    device
        Where tuning runs.
    scratch
        Keeps finished layers and the inputs of the next.
    """

    source: Checkpoint
    linears: Linears
    recipe: AnyRecipe
    samples: Sequence[Sample]
    device: torch.device
    scratch: Scratch

    def weight(self, linear: str) -> torch.Tensor:
        """Read the original weight [out_features, in_features] of a linear."""
        return read_tensor(self.source.folder, self.source.tensors[f"{linear}.weight"])


@dataclass(frozen=True)
class Filled:
    """What filling the linears of a checkpoint tells.

    Attributes
    ----------
    weight_errors
        Error of each linear's weight relative to the weight, both as Frobenius norms.
    outcomes
        Output errors of each decoder layer, tuned and rounded; empty for plain rounding.
    """

    weight_errors: dict[str, float]
    outcomes: list[Outcome]


def round_linears(job: Job, file: TensorFile) -> Filled:
    """Round the planned linears to nearest, and fill them into `file`.

    As many linears are in memory as torch may use threads, one thread each: that is faster than
    several threads on one linear, most of all on a busy machine.

    Raises
    ------
    NonFiniteWeightsError
        If a weight is NaN, infinite or too large for a float16 scale.
    """
    recipe = job.recipe

    def work(name: str) -> float:
        weight = job.weight(name)
        codes, scales = round_to_nearest(weight, recipe.bits, recipe.group_size)
        if not scales.isfinite().all():
            raise NonFiniteWeightsError(
                f"{job.source.folder}: {name}.weight holds NaN, infinite or huge weights; "
                "fetch the model again"
            )
        write_packed(file, name, pack(codes, scales, recipe.bits))
        return relative_error(weight, codes, scales)

    threads = torch.get_num_threads()
    with (
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        Progress("linears", len(job.linears)) as progress,
    ):
        errors = {}
        try:
            for name, error in zip(job.linears, pool.map(work, job.linears), strict=True):
                errors[name] = error
                progress.advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Filled(errors, [])


def pack_layer(
    job: Job, layer: torch.nn.Module, prefix: str, names: Sequence[str]
) -> Iterator[tuple[str, dict[str, torch.Tensor], float]]:
    """Pack the linears of a decoder layer that tuning has rounded, on the job's device.

    Yields
    ------
    tuple
        A linear's name, its packed tensors, and the relative error of its weight.

    Raises
    ------
    NonFiniteWeightsError
        If tuning left NaN or Inf.
    UserError
        If tuning left weights that are not multiples of their scale.
    """
    for name in names:
        module: Any = layer.get_submodule(name.removeprefix(prefix))
        scales = module.scale.detach().to(job.device, torch.float16)
        scales = scales.view(module.weight.shape[0], -1)
        weight = module.weight.detach().to(job.device)
        if not (weight.isfinite().all() and scales.isfinite().all()):
            raise NonFiniteWeightsError(f"quantize: {name} came back from tuning with NaN or Inf")
        codes, gap = restore_codes(weight, scales, job.recipe.bits)
        if not gap < MAX_GAP:
            raise UserError(f"quantize: {name} came back from tuning without whole codes")
        original = job.weight(name).to(job.device)
        yield name, pack(codes, scales, job.recipe.bits), relative_error(original, codes, scales)


def tune_linears(job: Job, file: TensorFile) -> Filled:
    """Fill the planned linears of `file` layer by layer, continuing where the scratch stands.

    Raises
    ------
    UserError
        If a sample is lost, or another set of linears was quantized than planned.
    """
    from colqwen3.model.loading import source_dtype
    from stages.quantization.deepstack import fold_deepstack, fold_into_layer
    from stages.quantization.layers import load_front, load_layer
    from stages.quantization.sample_packs import attend_within_samples

    recipe, scratch = job.recipe, job.scratch
    if isinstance(recipe, RtnRecipe):
        raise TypeError(f"{type(recipe).__name__} is not tuned")
    # in float32 on a CPU, in the stored dtype on a GPU, as AutoRound tunes
    dtype = torch.float32 if job.device.type == "cpu" else source_dtype(job.source)

    def front() -> Any:
        model = load_front(job.source, dtype, job.device)
        if recipe.deepstack:
            fold_deepstack(model)
        return model

    def load(model: Any, index: int) -> torch.nn.Module:
        layer: torch.nn.Module = load_layer(job.source, model, index, dtype)
        if recipe.deepstack:
            fold_into_layer(layer, index)
        if recipe.batch_size > 1:
            attend_within_samples(layer)
        return layer

    layers = split_by_layer(job.linears)
    for index, step in enumerate(scratch.steps):
        if layer_digest(file, layers[index]) != step["sha256"]:
            scratch.forget(f"layer {index} in it is damaged")
            break
    if scratch.steps:
        logger.info("continuing after layer %d of %d", len(scratch.steps), len(layers))
    tuned = tune_layers(job.samples, recipe, job.device, scratch, front, load, len(layers))
    for index, layer, files, outcome in tuned:
        names = layers[index]
        prefix = f"{BLOCKS}.{index}."
        check_quantized(layer, index, {name.removeprefix(prefix) for name in names})
        errors = {}
        for name, packed, error in pack_layer(job, layer, prefix, names):
            write_packed(file, name, packed)
            errors[name] = error
        step = {"sha256": layer_digest(file, names), "errors": errors, "outcome": asdict(outcome)}
        scratch.record(files, step)
        del layer  # else it takes memory beside the next one, while that is tuned
    return Filled(
        {name: error for step in scratch.steps for name, error in step["errors"].items()},
        [Outcome(**step["outcome"]) for step in scratch.steps],
    )


def split_by_layer(linears: Linears) -> list[list[str]]:
    """Return the names of the planned linears of each decoder layer."""
    layers: dict[int, list[str]] = {}
    for name in linears:
        index = name.removeprefix(f"{BLOCKS}.").partition(".")[0]
        layers.setdefault(int(index), []).append(name)
    return [layers[index] for index in sorted(layers)]


def write_packed(file: TensorFile, name: str, packed: dict[str, torch.Tensor]) -> None:
    """Write the packed tensors of one linear."""
    for part, tensor in packed.items():
        file.write(f"{name}.{part}", tensor)


def layer_digest(file: TensorFile, names: Sequence[str]) -> str:
    """Return the SHA-256 of the packed tensors of linears as they stand in the file."""
    digest = hashlib.sha256()
    for name in names:
        for part in PACKED_TENSORS:
            digest.update(file.read(f"{name}.{part}"))
    return digest.hexdigest()
