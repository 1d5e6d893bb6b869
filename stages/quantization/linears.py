"""Fills the quantized linears of a checkpoint file, rounded to nearest or tuned layer by layer."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import BLOCKS, EMBEDDINGS
from colqwen3.checkpoint.packing import (
    PACKED_TENSORS,
    dense_weight,
    dequantize,
    pack,
    pack_table,
    relative_error,
    restore_codes,
    round_to_nearest,
)
from colqwen3.checkpoint.quantization import PACKED_TABLE
from colqwen3.checkpoint.tensor_file import TensorFile, raw_bytes, read_rows, read_tensor
from colqwen3.system.errors import NonFiniteWeightsError, UserError
from colqwen3.system.files import digest_file, write_json
from colqwen3.system.progress import Progress
from colqwen3.system.resume import Scratch
from stages.quantization.activations import Sample
from stages.quantization.allocation import SIXTEEN, Allocation
from stages.quantization.end_to_end import EndToEndOutcome
from stages.quantization.model_hessians import Effects
from stages.quantization.recipes import AnyRecipe, GptqRecipe, RtnRecipe
from stages.quantization.tuning import (
    TOWER,
    Outcome,
    check_quantized,
    tune_layers,
    warn_of_rounding,
)

logger = logging.getLogger(__name__)

TABLE_ROWS = 4096
"""Rows of the token embeddings in memory at a time."""
MAX_GAP = 0.1
"""Steps that a 16-bit weight may be away from a whole code after tuning; half a step is no code."""


@dataclass(frozen=True)
class Job:
    """One checkpoint to make.

    Attributes
    ----------
    source
        The original model.
    allocation
        What to quantize, and to how many bits.
    recipe
        How.
    samples
        Calibration samples, each the arguments of one forward; empty for plain rounding.
    device
        Where tuning runs.
    scratch
        Keeps finished layers and the inputs of the next.
    kinds
        ``query``, ``page`` or ``passage`` for each sample, which whole-model steps need.
    """

    source: Checkpoint
    allocation: Allocation
    recipe: AnyRecipe
    samples: Sequence[Sample]
    device: torch.device
    scratch: Scratch
    kinds: Sequence[str] = ()

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
    tower
        The same of each module of the vision tower that was tuned, by its name.
    end_to_end
        Losses of the embeddings before and after end-to-end tuning; None without it.
    """

    weight_errors: dict[str, float]
    outcomes: list[Outcome]
    tower: dict[str, Outcome] = field(default_factory=dict)
    end_to_end: EndToEndOutcome | None = None


FindEffects = Callable[[Job, Sequence[Sample]], Sequence[Effects]]


def round_linears(job: Job, file: TensorFile, linears: Sequence[str]) -> dict[str, float]:
    """Round linears to nearest, and fill them into `file`; return the error of each weight.

    As many linears are in memory as torch may use threads, one thread each: that is faster than
    several threads on one linear, most of all on a busy machine.

    Raises
    ------
    NonFiniteWeightsError
        If a weight is NaN, infinite or too large for a float16 scale.
    """

    def work(name: str) -> float:
        weight = job.weight(name)
        bits = job.allocation.linears[name]
        codes, scales = round_to_nearest(weight, bits, job.recipe.group_size)
        if not scales.isfinite().all():
            raise NonFiniteWeightsError(
                f"{job.source.folder}: {name}.weight holds NaN, infinite or huge weights; "
                "fetch the model again"
            )
        write_packed(file, name, pack(codes, scales, bits))
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


def round_embeddings(job: Job, file: TensorFile) -> dict[str, float]:
    """Round the token embeddings to nearest, some rows at a time, and fill them into `file`.

    Returns
    -------
    dict
        Relative error of the table by its name; empty if it is not quantized.

    Raises
    ------
    NonFiniteWeightsError
        If a weight is NaN, infinite or too large for a float16 scale.
    """
    bits, wrong, whole = job.allocation.token_embeddings, 0.0, 0.0
    if bits == SIXTEEN:
        return {}
    stored = job.source.tensors[f"{EMBEDDINGS}.weight"]
    rows = stored.shape[0]
    with Progress("token embeddings", rows) as progress:
        for start in range(0, rows, TABLE_ROWS):
            part = read_rows(job.source.folder, stored, start, min(TABLE_ROWS, rows - start))
            codes, scales = round_to_nearest(part, bits, job.recipe.group_size)
            if not scales.isfinite().all():
                raise NonFiniteWeightsError(
                    f"{job.source.folder}: {EMBEDDINGS}.weight holds NaN, infinite or huge weights; "
                    "fetch the model again"
                )
            for name, tensor in pack_table(codes, scales, bits).items():
                file.write_rows(f"{EMBEDDINGS}.{name}", start, tensor)
            wrong += float((dense_weight(codes, scales) - part.float()).square().sum())
            whole += float(part.float().square().sum())
            progress.advance(len(part))
    return {EMBEDDINGS: (wrong / max(whole, 1e-24)) ** 0.5}


def fill(job: Job, file: TensorFile, find_effects: FindEffects) -> Filled:
    """Fill all quantized weights of `file`; what is outside the decoder layers is rounded first.

    `find_effects` tells what errors of each linear do, for GPTQ by the whole model, see
    `tuning.tune_layers`.

    Raises
    ------
    UserError
        If a weight is not finite, a sample is lost, or another set of linears was quantized than
        planned.
    """
    if isinstance(job.recipe, RtnRecipe):
        errors = round_linears(job, file, list(job.allocation.linears))
        return Filled({**errors, **round_embeddings(job, file)}, [])
    front = tune_tower(job, file) if job.allocation.vision else Filled({}, [])
    errors = {**front.weight_errors, **round_embeddings(job, file)}
    tuned = tune_linears(job, file, find_effects)
    return Filled({**tuned.weight_errors, **errors}, tuned.outcomes, front.tower)


def tune_tower(job: Job, file: TensorFile) -> Filled:
    """Fill the linears of the vision tower, tuned; what an earlier run finished is not done again.

    Raises
    ------
    UserError
        If a sample is lost, or the calibration set has no pages.
    """
    from stages.quantization.layers import load_front
    from stages.quantization.vision import tune_vision

    recipe, vision, path = job.recipe, job.allocation.vision, job.scratch.folder / TOWER
    assert not isinstance(recipe, RtnRecipe)
    if TOWER in job.scratch.files:
        record = json.loads(path.read_text(encoding="utf-8"))
        if layer_digest(file, vision) == record["sha256"]:
            known = {name: Outcome(**outcome) for name, outcome in record["tower"].items()}
            return Filled(record["errors"], [], known)
        job.scratch.forget("the vision tower in it is damaged")
    # in float32 on a GPU too: bfloat16 cannot tell the steps of 8 bits apart
    tower: Any = load_front(job.source, torch.float32, job.device).vlm.model.visual
    widths = {name: job.allocation.linears[name] for name in vision}
    errors, outcomes = {}, {}
    for done in tune_vision(tower, job.samples, recipe, widths, job.device):
        names = [name for name in vision if name.startswith(f"{done.name}.")]
        inside = {done.prefix + name.removeprefix(f"{done.name}.") for name in names}
        check_quantized(done.layer, done.name, inside)
        for name, packed, error in pack_layer(job, done.layer, f"{done.name}.", names, done.prefix):
            write_packed(file, name, packed)
            errors[name] = error
        outcomes[done.name] = done.outcome
        if not done.outcome.tuning_won:
            warn_of_rounding(done.name, done.outcome)
    write_json(
        path,
        {
            "sha256": layer_digest(file, vision),
            "errors": errors,
            "tower": {name: asdict(outcome) for name, outcome in outcomes.items()},
        },
    )
    job.scratch.record({TOWER: digest_file(path)})
    return Filled(errors, [], outcomes)


def pack_layer(
    job: Job, layer: torch.nn.Module, prefix: str, names: Sequence[str], inside: str = ""
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
        module: Any = layer.get_submodule(inside + name.removeprefix(prefix))
        scales = module.scale.detach().to(job.device, torch.float16)
        scales = scales.view(module.weight.shape[0], -1)
        weight = module.weight.detach().to(job.device)
        if not (weight.isfinite().all() and scales.isfinite().all()):
            raise NonFiniteWeightsError(f"quantize: {name} came back from tuning with NaN or Inf")
        bits = job.allocation.linears[name]
        codes, gap = restore_codes(weight, scales, bits)
        if not gap < MAX_GAP:
            raise UserError(f"quantize: {name} came back from tuning without whole codes")
        original = job.weight(name).to(job.device)
        yield name, pack(codes, scales, bits), relative_error(original, codes, scales)


def tune_linears(job: Job, file: TensorFile, find_effects: FindEffects) -> Filled:
    """Fill the linears of the decoder layers one layer at a time, continuing where the scratch stands.

    What comes before them must be in `file` already: the layers are tuned on what it gives.

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
    whole = isinstance(recipe, GptqRecipe) and recipe.hessian == "model"
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

    def quantize_front(model: Any) -> None:
        for name, bits in job.allocation.front.items():
            weight = model.get_submodule(name).weight
            weight.data.copy_(read_dense(file, name, bits))

    layers = job.allocation.layers
    for index, step in enumerate(scratch.steps):
        if layer_digest(file, layers[index]) != step["sha256"]:
            scratch.forget(f"layer {index} in it is damaged")
            break
    if scratch.steps:
        logger.info("continuing after layer %d of %d", len(scratch.steps), len(layers))
    widths = [
        {name.removeprefix(f"{BLOCKS}.{index}."): job.allocation.linears[name] for name in names}
        for index, names in enumerate(layers)
    ]
    tuned = tune_layers(
        job.samples, recipe, job.device, scratch, front, load, widths,
        quantize_front if job.allocation.front else None,
        partial(find_effects, job) if whole else None,
    )  # fmt: skip
    for index, layer, files, outcome in tuned:
        names = layers[index]
        prefix = f"{BLOCKS}.{index}."
        check_quantized(layer, f"layer {index}", {name.removeprefix(prefix) for name in names})
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


def write_packed(file: TensorFile, name: str, packed: dict[str, torch.Tensor]) -> None:
    """Write the packed tensors of one linear."""
    for part, tensor in packed.items():
        file.write(f"{name}.{part}", tensor)


def read_dense(file: TensorFile, name: str, bits: int) -> torch.Tensor:
    """Return the weight [rows, width] of a module that `file` holds packed, as float32."""
    from colqwen3.model.loading import dequantize_table

    if name == EMBEDDINGS:
        packed, scales = (file.tensor(f"{name}.{part}") for part in PACKED_TABLE)
        return dequantize_table(packed, scales, bits, torch.float32)
    parts = {part: file.tensor(f"{name}.{part}") for part in PACKED_TENSORS}
    return dequantize(**parts, bits=bits)


def layer_digest(
    file: TensorFile, names: Sequence[str], others: Mapping[str, torch.Tensor] | None = None
) -> str:
    """Return the SHA-256 of the packed tensors of linears as they stand in the file.

    Tensors that are in `others` by their name are taken from there instead.
    """
    digest = hashlib.sha256()
    for name in names:
        for part in PACKED_TENSORS:
            other = (others or {}).get(f"{name}.{part}")
            stored = file.read(f"{name}.{part}") if other is None else raw_bytes(other)
            digest.update(stored)
    return digest.hexdigest()
