"""What has all decoder layers in memory: end-to-end tuning, and the gradients that GPTQ may weigh by.

The result of the tuning is kept in the scratch before the checkpoint is touched, so that a killed run
repeats at most the tuning, never the layers.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from colqwen3.checkpoint.layout import BLOCKS
from colqwen3.checkpoint.packing import PACKED_TENSORS, relative_error, unpack
from colqwen3.checkpoint.tensor_file import TensorFile
from colqwen3.system.files import digest_file
from stages.quantization.activations import Hidden, Sample, read_states
from stages.quantization.end_to_end import (
    EndToEndOutcome,
    Network,
    Tail,
    accurate_arithmetic,
    run_layers,
    tune_end_to_end,
)
from stages.quantization.linears import Filled, Job, layer_digest
from stages.quantization.model_hessians import Effect, measure_effects
from stages.quantization.recipes import EndToEnd, RtnRecipe
from stages.quantization.tuned_linear import TunedLinear
from stages.quantization.tuning import INPUTS, QUANTIZED_INPUTS

logger = logging.getLogger(__name__)

TUNED = "end-to-end.safetensors"
"""Tensors of the checkpoint as tuned; its metadata hold the outcome as JSON."""


def restore(job: Job, file: TensorFile) -> None:
    """Store what an earlier run tuned, before the layers are looked at.

    It may have been killed while it did.
    """
    if TUNED in job.scratch.files:
        tensors, _ = _read(job)
        _write(file, tensors)


def finish(job: Job, file: TensorFile, filled: Filled) -> Filled:
    """Tune a checkpoint end to end if its recipe says so, and store the result in `file`.

    Parameters
    ----------
    job
        What was made.
    file
        The checkpoint.
    filled
        What filling its linears told.

    Raises
    ------
    UserError
        If there is but one sample of a kind, or a file is damaged.
    """
    recipe = None if isinstance(job.recipe, RtnRecipe) else job.recipe.end_to_end
    if recipe is None:
        return filled
    if TUNED not in job.scratch.files:
        _tune(job, file, recipe)
    tensors, outcome = _read(job)
    _write(file, tensors)
    errors = dict(filled.weight_errors)
    for linear in {name.rpartition(".")[0] for name in tensors}:
        codes, scales = _codes(file, linear, job.allocation.linears[linear])
        errors[linear] = relative_error(job.weight(linear), codes, scales)
    return replace(filled, weight_errors=errors, end_to_end=outcome)


def _tune(job: Job, file: TensorFile, recipe: EndToEnd) -> None:
    """Tune, and keep the result in the scratch; what did not help is not kept."""
    from stages.quantization.layers import load_front
    from stages.quantization.sample_packs import unpack_samples

    scratch = job.scratch
    name = QUANTIZED_INPUTS if QUANTIZED_INPUTS in scratch.files else INPUTS
    original, given = (
        unpack_samples(read_states(scratch.folder / path)) for path in (INPUTS, name)
    )
    with accurate_arithmetic(job.device):
        front = load_front(job.source, torch.float32, job.device)
        front.vlm.model.visual.to("meta")
        front.get_input_embeddings().to("meta")
        targets = embed_original(job, front, original)
        network, linears = build_network(job, file, front, with_codes=recipe.codes_lr > 0)
        outcome = tune_end_to_end(network, given, targets, job.kinds, recipe)
    if not outcome.won:
        logger.warning(
            "end-to-end tuning made samples that it did not see worse (loss %s, before %s); "
            "the layers stay as they were",
            *(_words(losses) for losses in (outcome.held_after, outcome.held_before)),
        )
        linears = {}
    stored = {
        f"{name}.{part}": tensor.cpu()
        for name, linear in linears.items()
        for part, tensor in linear.packed().items()
    }
    path = scratch.folder / TUNED
    metadata = {"outcome": json.dumps(asdict(outcome))}
    save_file(stored, path, metadata)
    # the layers are recognised by what they will hold, and this in one step with the file's name
    for step, names in zip(scratch.steps, job.allocation.layers, strict=True):
        step["sha256"] = layer_digest(file, names, stored)
    scratch.record({**scratch.files, TUNED: digest_file(path)})


def _words(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {loss:.3g}" for kind, loss in losses.items())


def _read(job: Job) -> tuple[dict[str, torch.Tensor], EndToEndOutcome]:
    with safe_open(job.scratch.folder / TUNED, framework="pt") as stored:
        names = list(stored.keys())
        outcome = EndToEndOutcome(**json.loads(stored.metadata()["outcome"]))
        return {name: stored.get_tensor(name) for name in names}, outcome


def _write(file: TensorFile, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        file.write(name, tensor)


def _codes(file: TensorFile, linear: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, int8 [out_features, in_features], and scales [out_features, groups]."""
    qweight, qzeros, scales = (file.tensor(f"{linear}.{part}") for part in PACKED_TENSORS)
    return unpack(qweight, qzeros, bits).to(torch.int8), scales.T.contiguous()


def _load(job: Job, front: Any, index: int) -> nn.Module:
    """Return an original decoder layer that takes packs of samples, in float32 on the CPU."""
    from stages.quantization.deepstack import fold_into_layer
    from stages.quantization.layers import load_layer
    from stages.quantization.sample_packs import attend_within_samples

    layer: nn.Module = load_layer(job.source, front, index, torch.float32)
    fold_into_layer(layer, index)
    attend_within_samples(layer)
    return layer.requires_grad_(False)


def embed_original(job: Job, front: Any, samples: Sequence[Sample]) -> Hidden:
    """Return unit vectors [1, tokens, embed_dim] of the full-precision model, one layer at a time.

    Parameters
    ----------
    job
        Gives the model.
    front
        As `layers.load_front` returns it; its norm and projection are used.
    samples
        What the first decoder layer is given.
    """
    states = list(samples)
    tail = Tail(front.vlm.model.language_model.norm, front.embedding_proj_layer)
    with torch.no_grad():
        for index in range(len(job.allocation.layers)):
            layer = _load(job, front, index).to(job.device)
            states = [
                {**state, "hidden_states": run_layers([layer], [state], job.device)}
                for state in states
            ]
        return [tail(state["hidden_states"]) for state in states]


def find_effects(job: Job, packs: Sequence[Sample]) -> list[dict[str, Effect]]:
    """Return what errors of each linear of each layer do to the embeddings, for GPTQ.

    The full-precision decoder layers are all in memory for this, in float32.

    Parameters
    ----------
    job
        Gives the model and the kinds of the samples.
    packs
        What the first decoder layer is given, one sample or a pack of them each.
    """
    from stages.quantization.layers import load_front

    with accurate_arithmetic(job.device):
        front = load_front(job.source, torch.float32, job.device)
        front.vlm.model.visual.to("meta")
        front.get_input_embeddings().to("meta")
        count = len(job.allocation.layers)
        layers = [_load(job, front, index).to(job.device) for index in range(count)]
        tail = Tail(front.vlm.model.language_model.norm, front.embedding_proj_layer)
        network = Network(layers, tail.requires_grad_(False), job.device)
        return measure_effects(network, packs, job.kinds)


def build_network(
    job: Job, file: TensorFile, front: Any, with_codes: bool
) -> tuple[Network, dict[str, TunedLinear]]:
    """Return the quantized model as it stands in a file, and its linears by name.

    Parameters
    ----------
    job
        Gives the model, and the bits of its linears.
    file
        The checkpoint with all linears filled.
    front
        As `layers.load_front` returns it; its norm and projection are used.
    with_codes
        Whether codes can be tuned beside scales.
    """
    layers, linears = [], dict[str, TunedLinear]()
    for index, names in enumerate(job.allocation.layers):
        layer = _load(job, front, index)
        for name in names:
            inside = name.removeprefix(f"{BLOCKS}.{index}.")
            original: Any = layer.get_submodule(inside)
            bits = job.allocation.linears[name]
            linears[name] = TunedLinear(
                *_codes(file, name, bits),
                bits,
                original.weight if with_codes else None,
                original.bias,
            )
            layer.set_submodule(inside, linears[name])
        layers.append(layer.to(job.device))
    tail = Tail(front.vlm.model.language_model.norm, front.embedding_proj_layer)
    return Network(layers, tail.requires_grad_(False).to(job.device), job.device), linears
