"""AutoRound on one decoder layer at a time, on inputs that are the full model's own.

The front of the model (vision tower, token embeddings, deepstack mergers) runs once over the
calibration samples and gives the inputs of the first layer; each layer is then loaded, handed to
AutoRound's ``quantize_block`` and dropped, so that memory holds one layer whatever the model's
size. Its output in full precision and its output once quantized, both from AutoRound, are the
next layer's inputs; they are kept on disk, so that a killed run goes on where it stopped.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from colqwen3.system.errors import UserError, first_line
from colqwen3.system.files import digest_file
from colqwen3.system.resume import Scratch
from stages.quantization.recipes import AutoRoundRecipe
from stages.quantization.sample_packs import pack_samples

logger = logging.getLogger(__name__)

Sample = dict[str, torch.Tensor]
Hidden = list[torch.Tensor]
"""Hidden states [1, tokens, hidden], one tensor a sample."""

INPUTS = "inputs.safetensors"
CHAIN = "chain-{:05d}.safetensors"


class _Reached(Exception):
    """Ends a forward at the first decoder layer."""


class _Quiet(logging.Filter):
    """Drops AutoRound's advice on spelling and its word on a data set that it does not use."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not message.startswith(("Passing '", "Using default calibration dataset"))


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
    UserError
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
                reason = first_line(error)
                raise UserError(
                    f"calibration sample {number} fails in the model ({reason}); "
                    "run `dvc repro -f calibrate`"
                ) from None
    finally:
        handle.remove()
    if len(caught) != len(samples):
        raise UserError(
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
    made: dict[str, Any] = {}
    for key in sorted(values):
        name, _, place = key.partition(".")
        made[name] = (*made.get(name, ()), values[key]) if place else values[key]
    return made


def tune_layer(
    block: nn.Module,
    inputs: Sequence[Sample],
    hidden: Hidden,
    quantized: Hidden | None,
    recipe: AutoRoundRecipe,
    device: torch.device,
) -> tuple[Hidden, Hidden | None]:
    """Quantize one decoder layer in place with AutoRound.

    Its linears then hold rounded weights, ``scale`` [out_features, groups] and ``zp``.

    Parameters
    ----------
    block
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
        Outputs of the layer before and after, each fit to be the next layer's input; None for the
        latter without tuning, which never looks at it.

    Raises
    ------
    UserError
        If AutoRound lost a sample.
    """
    from auto_round import AutoRound
    from auto_round.logger import logger as library_logger

    if not any(isinstance(item, _Quiet) for item in library_logger.filters):
        library_logger.addFilter(_Quiet())
    options: dict[str, Any] = {}
    if recipe.iters:
        options = {
            "gradient_accumulate_steps": recipe.gradient_accumulate_steps,
            "lr": recipe.lr,
            # "best" would compare sums over different samples: a step that drew short ones wins
            "not_use_best_mse": True,
        }
    rounder = AutoRound(
        Holder(block),
        tokenizer="",  # only there to be looked at
        scheme="W4A16",
        bits=recipe.bits,
        group_size=recipe.group_size,
        sym=recipe.sym,
        nsamples=len(hidden),
        batch_size=1,  # samples are of unequal lengths, and unpadded; a pack is one of them
        iters=recipe.iters,
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
        block, calls, q_input=None if quantized is None else list(quantized), device=str(device)
    )
    for outputs in (before, after):
        if outputs is not None and len(outputs) != len(hidden):
            raise UserError(
                f"quantize: AutoRound was given {len(hidden)} calibration samples and used "
                f"{len(outputs)}; its log above may say why"
            )
    return list(before), None if after is None else list(after)


def tune_layers(
    samples: Sequence[Sample],
    recipe: AutoRoundRecipe,
    device: torch.device,
    scratch: Scratch,
    load_front: Callable[[], Any],
    load_layer: Callable[[Any, int], nn.Module],
    count: int,
) -> Iterator[tuple[int, nn.Module, dict[str, str]]]:
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
        Number of the layer, the layer as `tune_layer` leaves it, and the files to keep in the
        scratch once its result is stored.

    Raises
    ------
    UserError
        If a sample is lost.
    """
    front = load_front()
    path = scratch.folder / INPUTS
    if INPUTS not in scratch.files:
        found = capture_inputs(front, front.vlm.model.language_model.layers[0], samples)
        if recipe.batch_size > 1:
            found = pack_samples(found, recipe.batch_size)
        _write_samples(path, found)
        scratch.record({INPUTS: digest_file(path)})
    inputs = _read_samples(path)
    front = front.to("meta")  # only its classes and config are needed from here
    # AutoRound collects garbage many times a layer; what is loaded by now need not be looked at
    gc.freeze()
    start = len(scratch.steps)
    quantized: Hidden | None
    if start:
        kept = _read_samples(scratch.folder / CHAIN.format(start - 1))
        hidden = [s["full"] for s in kept]
        quantized = [s["quantized"] for s in kept] if "quantized" in kept[0] else None
    else:
        hidden, quantized = [s["hidden_states"] for s in inputs], None
    for index in range(start, count):
        block = load_layer(front, index)
        hidden, quantized = tune_layer(block, inputs, hidden, quantized, recipe, device)
        chain = scratch.folder / CHAIN.format(index)
        kept = [{"full": state} for state in hidden]
        for item, state in zip(kept, quantized or (), strict=quantized is not None):
            item["quantized"] = state
        _write_samples(chain, kept)
        yield index, block, {INPUTS: scratch.files[INPUTS], chain.name: digest_file(chain)}
        logger.info("layer %d of %d is quantized", index + 1, count)


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


def check_quantized(block: nn.Module, index: int, planned: set[str]) -> None:
    """Compare the linears that AutoRound quantized in a layer with the planned ones.

    Parameters
    ----------
    block
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
    made = {name for name, module in block.named_modules() if hasattr(module, "scale")}
    for name in sorted(made ^ planned):
        problem = "quantized but not planned" if name in made else "planned but not quantized"
        raise UserError(
            f"quantize: {name} of layer {index} was {problem}; AutoRound's log above may say why"
        )
