"""What decoder layers are given and give: captured, computed, compared and kept on disk."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from colqwen3.system.errors import UserError, first_line

Sample = dict[str, torch.Tensor]
Hidden = list[torch.Tensor]
"""Hidden states [1, tokens, hidden], one tensor a sample."""


class SamplesLostError(UserError):
    """Not every calibration sample took part in tuning."""


class _Reached(Exception):
    """Ends a forward at the first decoder layer."""


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
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
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


def unflatten(values: Sample) -> dict[str, Any]:
    """Return the keywords of a layer's call by what `capture_inputs` noted of it."""
    nested: dict[str, Any] = {}
    for key in sorted(
        values, key=lambda key: (key.partition(".")[0], int(key.partition(".")[2] or 0))
    ):
        name, _, place = key.partition(".")
        nested[name] = (*nested.get(name, ()), values[key]) if place else values[key]
    return nested


@torch.no_grad()
def layer_outputs(
    layer: nn.Module, inputs: Sequence[Sample], hidden: Hidden, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield the output [1, tokens, hidden] of a layer for each sample, on `device`."""
    layer.to(device)
    for state, others in zip(hidden, inputs, strict=True):
        sample = {**others, "hidden_states": state}
        output = layer(**unflatten({key: value.to(device) for key, value in sample.items()}))
        yield output[0] if isinstance(output, tuple) else output


def output_error(outputs: Iterable[torch.Tensor], expected: Hidden) -> float:
    """Return the norm of the outputs' difference to the expected ones, relative to their norm."""
    wrong = total = 0.0
    for output, target in zip(outputs, expected, strict=True):
        target = target.to(output.device).double()
        wrong += float((output.double() - target).square().sum())
        total += float(target.square().sum())
    return math.sqrt(wrong / total) if total else math.sqrt(wrong)


def write_states(path: Path, samples: Sequence[Sample]) -> None:
    """Write tensors of samples, or of packs of them, to a safetensors file."""
    tensors = {
        f"{i}/{key}": value.contiguous()
        for i, sample in enumerate(samples)
        for key, value in sample.items()
    }
    save_file(tensors, path)


def read_states(path: Path) -> list[Sample]:
    """Read what `write_states` wrote."""
    samples: dict[int, Sample] = {}
    for name, tensor in load_file(path).items():
        number, _, key = name.partition("/")
        samples.setdefault(int(number), {})[key] = tensor
    return [samples[number] for number in sorted(samples)]
