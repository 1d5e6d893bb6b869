"""AutoRound on one decoder layer at a time, on inputs that are the full model's own.

The front of the model (vision tower, token embeddings, deepstack mergers) runs once over the
calibration samples and gives the inputs of the first layer; each layer is then loaded, handed to
AutoRound's ``quantize_block`` and dropped, so that memory holds one layer whatever the model's
size. Its output in full precision and its output once quantized, both from AutoRound, are the
next layer's inputs; they are kept on disk, so that a killed run goes on where it stopped.
"""

import copy
import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from colqwen3.checkpoint.packing import round_to_nearest
from colqwen3.system.errors import UserError, first_line
from colqwen3.system.files import digest_file
from colqwen3.system.progress import Progress
from colqwen3.system.resume import Scratch
from stages.quantization.recipes import AutoRoundRecipe
from stages.quantization.sample_packs import pack_samples

logger = logging.getLogger(__name__)

Sample = dict[str, torch.Tensor]
Hidden = list[torch.Tensor]
"""Hidden states [1, tokens, hidden], one tensor a sample."""

INPUTS = "inputs.safetensors"
CHAIN = "chain-{:05d}.safetensors"


class SamplesLostError(UserError):
    """Not every calibration sample took part in tuning."""


@dataclass(frozen=True)
class Outcome:
    """Output error of one decoder layer over all calibration samples, both ways.

    Each is the norm of the difference to the full-precision layer's output, divided by the norm of
    that output; both layers are given the same inputs, those that the quantized model gives them.

    Attributes
    ----------
    tuned
        Of the layer as AutoRound left it.
    rounded
        Of the layer with its linears rounded to nearest.
    """

    tuned: float
    rounded: float

    @property
    def tuning_won(self) -> bool:
        """Whether the tuned layer is kept: it is at least as good as the rounded one."""
        return self.tuned <= self.rounded  # False for NaN


class _Reached(Exception):
    """Ends a forward at the first decoder layer."""


class _Quiet(logging.Filter):
    """Drops AutoRound's remarks on options that are set on purpose, and on data it does not use."""

    REMARKS = (
        "Passing '",
        "Using default calibration dataset",
        "Deterministic algorithms are enabled",
        "'enable_torch_compile' is disabled",
        "`torch.compile` is disabled",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.REMARKS)


def calm_log(library_logger: logging.Logger) -> None:
    """Keep AutoRound's remarks and its colour codes out of the log."""
    if not any(isinstance(item, _Quiet) for item in library_logger.filters):
        library_logger.addFilter(_Quiet())
        for handler in library_logger.handlers:
            handler.setFormatter(logging.Formatter("%(levelname)s auto_round: %(message)s"))


class Holder(nn.Module):
    """What AutoRound takes for a model: one decoder layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])
        self.config = SimpleNamespace(model_type="decoder_layer", architectures=["Holder"])
        self.name_or_path = ""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        return self.layers[0](*args, **kwargs)


@torch.no_grad()
def capture_inputs(model: Any, layer: nn.Module, samples: Sequence[Sample]) -> list[Sample]:
    """Return what `layer` is given in a forward of each sample, on the CPU.

    A tuple of tensors under the keyword ``k`` becomes ``k.0``, ``k.1``; the hidden states
    [1, tokens, hidden] are ``hidden_states``.

    Raises
    ------
    SamplesLostError
        If a sample does not reach the layer.
    """
    caught: list[Sample] = []

    def catch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**kwargs, **({"hidden_states": args[0]} if args else {})}
        caught.append({key: value.cpu() for key, value in _flatten(named)})
        raise _Reached

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for number, sample in enumerate(samples):
            try:
                model(**{key: value.to(model.device) for key, value in sample.items()})
            except _Reached:
                continue
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise SamplesLostError(
                    f"calibration sample {number} fails in the model ({first_line(error)}); "
                    "run `dvc repro -f calibrate`"
                ) from None
    finally:
        handle.remove()
    if len(caught) != len(samples):
        raise SamplesLostError(
            f"calibration: {len(samples)} samples asked for, {len(caught)} reached the first layer"
        )
    return caught


def _flatten(values: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            yield key, value
        elif isinstance(value, tuple):
            yield from ((f"{key}.{place}", part) for place, part in enumerate(value))
        elif value is not None and value is not False:
            raise TypeError(f"a decoder layer is given {key}={value!r}, which cannot be kept")


def _unflatten(values: Sample) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key in sorted(values):
        name, _, place = key.partition(".")
        nested[name] = (*nested.get(name, ()), values[key]) if place else values[key]
    return nested


def tune_layer(
    layer: nn.Module,
    inputs: Sequence[Sample],
    hidden: Hidden,
    quantized: Hidden | None,
    recipe: AutoRoundRecipe,
    device: torch.device,
) -> tuple[Hidden, Hidden | None, Outcome]:
    """Quantize one decoder layer in place: tuned by AutoRound, or rounded where that is better.

    Its linears then hold rounded weights, ``scale`` [out_features, groups] and ``zp``.

    Parameters
    ----------
    layer
        The layer.
    inputs
        What each sample gives the layer besides hidden states.
    hidden
        Input of the layer in the full-precision model.
    quantized
        Input of the layer once those before it are quantized; None for the first, and without
        tuning.
    recipe
        How to tune.
    device
        Where.

    Returns
    -------
    tuple
        Outputs of the layer before and after, each fit to be the next layer's input (None for the
        latter without tuning, which never looks at it), and the errors of both ways.

    Raises
    ------
    SamplesLostError
        If AutoRound lost a sample.
    """
    rounded = copy.deepcopy(layer)
    before, after = run_autoround(layer, inputs, hidden, quantized, recipe, device)
    if before is None:  # without tuning, AutoRound needs no data at 8 bits
        before = list(layer_outputs(rounded, inputs, hidden, device))
    scales = round_layer(rounded.to(device), recipe)
    given = hidden if quantized is None else quantized
    tuned_error, rounded_error = (
        output_error(layer_outputs(way, inputs, given, device), before) for way in (layer, rounded)
    )
    outcome = Outcome(tuned_error, rounded_error)
    if not outcome.tuning_won:
        for name, scale in scales.items():
            module: Any = layer.get_submodule(name)
            weight: Any = rounded.get_submodule(name).weight
            module.weight.data.copy_(weight)
            module.scale = scale
        if after is not None:
            after = list(layer_outputs(layer, inputs, given, device))
    return before, after, outcome


@torch.no_grad()
def layer_outputs(
    layer: nn.Module, inputs: Sequence[Sample], hidden: Hidden, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield the output [1, tokens, hidden] of a layer for each sample, on `device`."""
    layer.to(device)
    for state, others in zip(hidden, inputs, strict=True):
        sample = {**others, "hidden_states": state}
        output = layer(**_unflatten({key: value.to(device) for key, value in sample.items()}))
        yield output[0] if isinstance(output, tuple) else output


def output_error(outputs: Iterable[torch.Tensor], expected: Hidden) -> float:
    """Return the norm of the outputs' difference to the expected ones, relative to their norm."""
    wrong = total = 0.0
    for output, target in zip(outputs, expected, strict=True):
        target = target.to(output.device).double()
        wrong += float((output.double() - target).square().sum())
        total += float(target.square().sum())
    return math.sqrt(wrong / total) if total else math.sqrt(wrong)


@torch.no_grad()
def round_layer(layer: nn.Module, recipe: AutoRoundRecipe) -> dict[str, torch.Tensor]:
    """Round the linears of a layer to nearest in place; return their scales [out_features, groups]."""
    scales = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            codes, scale = round_to_nearest(module.weight, recipe.bits, recipe.group_size)
            groups = codes.float().view(*scale.shape, -1) * scale.float().unsqueeze(-1)
            module.weight.copy_(groups.flatten(1))
            scales[name] = scale
    return scales


def run_autoround(
    layer: nn.Module,
    inputs: Sequence[Sample],
    hidden: Hidden,
    quantized: Hidden | None,
    recipe: AutoRoundRecipe,
    device: torch.device,
) -> tuple[Hidden | None, Hidden | None]:
    """Quantize one decoder layer in place with AutoRound; see `tune_layer`.

    Returns
    -------
    tuple
        Outputs of the layer before (None where AutoRound needs no data) and after (None without
        tuning).

    Raises
    ------
    SamplesLostError
        If AutoRound lost a sample.
    """
    from auto_round import AutoRound
    from auto_round.logger import logger as library_logger

    calm_log(library_logger)
    options: dict[str, Any] = {}
    if recipe.iters:
        options = {
            "gradient_accumulate_steps": recipe.gradient_accumulate_steps,
            "lr": recipe.step_size,
            # "best" would compare sums over different samples: a step that drew short ones wins
            "not_use_best_mse": True,
        }
    rounder = AutoRound(
        Holder(layer),
        tokenizer="",  # only there to be looked at
        scheme="W4A16",
        bits=recipe.bits,
        group_size=recipe.group_size,
        sym=recipe.sym,
        nsamples=len(hidden),
        batch_size=1,  # samples are of unequal lengths, and unpadded; a pack is one of them
        # AutoRound collects its result before the last step, so one more makes `iters` steps
        iters=recipe.iters + 1 if recipe.iters else 0,
        seed=recipe.seed,
        device_map=0 if device.type == "cuda" else "cpu",
        amp=device.type != "cpu",  # on a CPU always float32, whether or not it has bfloat16
        enable_torch_compile=False,  # other bits, and minutes of compiling on a CPU
        enable_deterministic_algorithms=True,
        **options,
    )
    rounder.post_init()
    # only a run over a whole model hands this down
    rounder.alg_composer.block_forward.batch_size = 1
    # else every output makes a detour over the CPU
    rounder.alg_composer.block_forward.cache_device = device
    calls = []
    for state, others in zip(hidden, inputs, strict=True):
        kwargs = _unflatten(others)
        kwargs["hidden_states"] = state
        calls.append((((), kwargs),))
    after, before = rounder.quantize_block(
        layer, calls, q_input=None if quantized is None else list(quantized), device=str(device)
    )
    for outputs in (before, after):
        if outputs is not None and len(outputs) != len(hidden):
            raise SamplesLostError(
                f"quantize: AutoRound was given {len(hidden)} calibration samples and used "
                f"{len(outputs)}; its log above may say why"
            )
    return None if before is None else list(before), None if after is None else list(after)


def tune_layers(
    samples: Sequence[Sample],
    recipe: AutoRoundRecipe,
    device: torch.device,
    scratch: Scratch,
    load_front: Callable[[], Any],
    load_layer: Callable[[Any, int], nn.Module],
    count: int,
) -> Iterator[tuple[int, nn.Module, dict[str, str], Outcome]]:
    """Tune the decoder layers from the first that `scratch` does not know as done.

    Parameters
    ----------
    samples
        Calibration samples, each the arguments of one forward.
    recipe
        How to tune.
    device
        Where.
    scratch
        Keeps the inputs of the next layer.
    load_front
        Gives the model up to its first decoder layer, ``vlm.model.language_model.layers[0]``.
    load_layer
        Gives a decoder layer by the front and its number.
    count
        How many decoder layers there are.

    Yields
    ------
    tuple
        Number of the layer, the layer as `tune_layer` leaves it, the files to keep in the scratch
        once its result is stored, and the errors of both ways.

    Raises
    ------
    SamplesLostError
        If a sample is lost.
    """
    front = load_front()
    path = scratch.folder / INPUTS
    if INPUTS not in scratch.files:
        captured = capture_inputs(front, front.vlm.model.language_model.layers[0], samples)
        if recipe.batch_size > 1:
            captured = pack_samples(captured, recipe.batch_size)
        _write_samples(path, captured)
        scratch.record({INPUTS: digest_file(path)})
    inputs = _read_samples(path)
    front = front.to("meta")  # only its classes and config are needed from here
    # AutoRound collects garbage many times a layer; what is loaded by now need not be looked at
    gc.freeze()
    start = len(scratch.steps)
    quantized: Hidden | None
    if start:
        states = _read_samples(scratch.folder / CHAIN.format(start - 1))
        hidden = [state["full"] for state in states]
        quantized = [s["quantized"] for s in states] if "quantized" in states[0] else None
    else:
        hidden, quantized = [sample["hidden_states"] for sample in inputs], None
    with Progress("decoder layers", count, start) as progress:
        for index in range(start, count):
            layer = load_layer(front, index)
            hidden, quantized, outcome = tune_layer(
                layer, inputs, hidden, quantized, recipe, device
            )
            if not outcome.tuning_won:
                logger.warning(
                    "layer %d: tuning made the output worse than rounding (error %.4g against %.4g); "
                    "it is rounded instead", index, outcome.tuned, outcome.rounded,
                )  # fmt: skip
            chain = scratch.folder / CHAIN.format(index)
            states = [{"full": state} for state in hidden]
            for item, state in zip(states, quantized or (), strict=quantized is not None):
                item["quantized"] = state
            _write_samples(chain, states)
            files = {INPUTS: scratch.files[INPUTS], chain.name: digest_file(chain)}
            yield index, layer, files, outcome
            progress.advance()


def _write_samples(path: Path, samples: Sequence[Sample]) -> None:
    tensors = {
        f"{i}/{key}": value.contiguous()
        for i, sample in enumerate(samples)
        for key, value in sample.items()
    }
    save_file(tensors, path)


def _read_samples(path: Path) -> list[Sample]:
    samples: dict[int, Sample] = {}
    for name, tensor in load_file(path).items():
        number, _, key = name.partition("/")
        samples.setdefault(int(number), {})[key] = tensor
    return [samples[number] for number in sorted(samples)]


def check_quantized(layer: nn.Module, index: int, planned: set[str]) -> None:
    """Compare the linears that AutoRound quantized in a layer with the planned ones.

    Parameters
    ----------
    layer
        The layer after `tune_layer`.
    index
        Its number, for the error.
    planned
        Names of the linears to quantize within the layer.

    Raises
    ------
    UserError
        Naming the first linear that was left out or quantized beyond the plan.
    """
    quantized = {name for name, module in layer.named_modules() if hasattr(module, "scale")}
    for name in sorted(quantized ^ planned):
        problem = "quantized but not planned" if name in quantized else "planned but not quantized"
        raise UserError(
            f"quantize: {name} of layer {index} was {problem}; AutoRound's log above may say why"
        )
