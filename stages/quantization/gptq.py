"""GPTQ on one decoder layer at a time, on the same samples as AutoRound: one pass, no step size.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. Columns are taken in their order, without sorting by activation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from colqwen3.checkpoint.packing import SMALLEST_SCALE, dense_weight, round_to_nearest
from colqwen3.system.errors import NonFiniteWeightsError
from stages.quantization.activations import Hidden, Sample, layer_outputs
from stages.quantization.model_hessians import Effects
from stages.quantization.recipes import GptqRecipe

DAMPING = 0.01
"""Of the Hessian's mean diagonal, added to its diagonal; the paper's own value."""
SHRINKAGE = torch.linspace(1, 0.6, 21, dtype=torch.float64)
"""Factors to try on the scale that represents a group's largest weight."""
SIDE = 64
"""Rows and columns of the blocks that `quantize_by_outputs` cuts a weight into."""


@torch.no_grad()
def run_gptq(
    layer: nn.Module,
    inputs: Sequence[Sample],
    hidden: Hidden,
    quantized: Hidden | None,
    recipe: GptqRecipe,
    bits: Mapping[str, int],
    device: torch.device,
    effects: Effects | None = None,
) -> tuple[Hidden, Hidden, dict[str, torch.Tensor]]:
    """Quantize one decoder layer in place with GPTQ; parameters as of `tuning.tune_layer`.

    The Hessians are of the inputs that the linears have once the layers before are quantized.

    Returns
    -------
    tuple
        Outputs of the layer before, on `hidden`, and after, on `quantized`, and the Hessians, as
        `collect_hessians` returns them.

    Raises
    ------
    NonFiniteWeightsError
        If a linear is given NaN or infinite inputs, or has such gradients.
    """
    for name, effect in (effects or {}).items():
        if not all(part.isfinite().all() for part in (effect.outer, *effect.weights)):
            raise NonFiniteWeightsError(f"quantize: {name} has NaN or infinite gradients")
    before = list(layer_outputs(layer, inputs, hidden, device))
    given = hidden if quantized is None else quantized
    hessians = collect_hessians(layer, inputs, given, device, effects)
    for name, hessian in hessians.items():
        if name not in bits:
            continue
        if not hessian.isfinite().all():
            raise NonFiniteWeightsError(f"quantize: {name} is given NaN or infinite inputs")
        module: Any = layer.get_submodule(name)
        if effects is None:
            codes, scales = quantize_weight(module.weight, hessian, bits[name], recipe.group_size)
        else:
            outer = effects[name].outer.to(device).double()
            codes, scales = quantize_by_outputs(
                module.weight, hessian, outer, bits[name], recipe.group_size
            )
        module.weight.copy_(dense_weight(codes, scales))
        module.scale = scales
    return before, list(layer_outputs(layer, inputs, given, device)), hessians


@torch.no_grad()
def effect_error(
    layer: nn.Module,
    original: Mapping[str, torch.Tensor],
    hessians: Mapping[str, torch.Tensor],
    effects: Effects,
) -> float:
    """Return what the errors of a layer's linears do to the final embeddings, to second order.

    That is the root of the sum of tr(outer E hessian E^T) over the linears, relative to the same of
    the weights themselves: what `quantize_by_outputs` keeps small.

    Parameters
    ----------
    layer
        The layer with quantized weights.
    original
        The weight of each quantized linear before, by its name in the layer.
    hessians
        As `run_gptq` returns them.
    effects
        Of all linears of the layer.
    """
    wrong = whole = 0.0
    for name, weight in original.items():
        hessian, full = hessians[name], weight.to(hessians[name])
        outer = effects[name].outer.to(hessian)
        quantized: Any = layer.get_submodule(name)
        error = quantized.weight.to(hessian) - full
        wrong += float(((outer @ error) * (error @ hessian)).sum())
        whole += float(((outer @ full) * (full @ hessian)).sum())
    return float((wrong / max(whole, 1e-24)) ** 0.5)


@torch.no_grad()
def collect_hessians(
    layer: nn.Module,
    inputs: Sequence[Sample],
    hidden: Hidden,
    device: torch.device,
    effects: Effects | None = None,
) -> dict[str, torch.Tensor]:
    """Return the sum of x x^T over all tokens x that each linear of a layer is given.

    Parameters
    ----------
    layer, inputs, hidden, device
        As of `activations.layer_outputs`.
    effects
        Of all linears of the layer, by which tokens are weighted.

    Returns
    -------
    dict
        Float64 [in_features, in_features] on `device`, by the linear's name, in order of the calls.
    """
    with watch_hessians(layer, effects) as hessians:
        for _ in layer_outputs(layer, inputs, hidden, device):
            pass
    return hessians


@contextmanager
def watch_hessians(
    module: nn.Module, effects: Effects | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Add up x x^T over all tokens x that each linear of a module is given within the context.

    Parameters
    ----------
    module
        What is watched.
    effects
        Weights of the tokens of each call; None: all count the same.

    Yields
    ------
    dict
        Filled as the linears run: float64 [in_features, in_features] by the linear's name.
    """
    hessians: dict[str, torch.Tensor] = {}

    def watch(name: str, linear: nn.Module) -> Any:
        weights = None if effects is None else iter(effects[name].weights)

        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens = args[0].flatten(0, -2).float()
            if weights is not None:
                tokens = tokens * next(weights).to(tokens).sqrt().unsqueeze(-1)
            product = (tokens.T @ tokens).double()
            hessians[name] = hessians[name].add_(product) if name in hessians else product

        return linear.register_forward_pre_hook(add)

    handles = [
        watch(name, linear)
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    try:
        yield hessians
    finally:
        for handle in handles:
            handle.remove()


def quantize_weight(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int | torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight column by column; the columns to come make up for each one's error.

    Parameters
    ----------
    weight
        Float [out_features, in_features].
    hessian
        Float64 [in_features, in_features]: the sum of x x^T over inputs x of the linear.
    bits
        Bits of one weight, for all rows or as an integer tensor [out_features].
    group_size
        Weights of a row that share one scale; divides in_features.

    Returns
    -------
    tuple
        Codes, int8 [out_features, in_features] from ``-2 ** (bits - 1)``, and scales, float16
        [out_features, groups], as of `colqwen3.checkpoint.packing.round_to_nearest`.
    """
    limit = (2 ** (torch.as_tensor(bits, device=hessian.device) - 1)).expand(len(weight))
    weight = weight.detach().to(hessian.device, torch.float64, copy=True)
    inverse = inverse_factor(hessian)
    rounded: Callable[..., tuple[torch.Tensor, ...]] = round_group
    if weight.is_cuda:
        first = slice(group_size)
        rounded = Recorded(
            round_group, weight[:, first], inverse[first, first], weight[:, 0], limit
        )
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = weight.new_empty(len(weight), weight.shape[1] // group_size, dtype=torch.float16)
    for group, start in enumerate(range(0, weight.shape[1], group_size)):
        end = start + group_size
        block = weight[:, start:end]
        scale = search_scale(block, bits)
        scales[:, group] = scale
        codes[:, start:end], errors = rounded(
            block, inverse[start:end, start:end], scale.double(), limit
        )
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return codes, scales


def quantize_by_outputs(
    weight: torch.Tensor, hessian: torch.Tensor, outer: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight so that tr(outer E hessian E^T) of its error E stays small.

    Weights are rounded row by row, and in a row column by column; the columns to come in the row make
    up for each one's error, as in `quantize_weight`, and the rows to come for that of each row. A
    weight needs those above it and those on its left, so a whole diagonal is rounded at a time: one of
    blocks, and in all of these one of weights after the other.

    Parameters
    ----------
    weight, hessian, bits, group_size
        As of `quantize_weight`, with one width for all rows.
    outer
        Float64 [out_features, out_features]: how the loss depends on pairs of outputs.

    Returns
    -------
    tuple
        Codes and scales as of `quantize_weight`; the scales are those that represent the original
        weight best.
    """
    weight = weight.detach().to(hessian.device, torch.float64)
    (rows, columns), limit = weight.shape, 2 ** (bits - 1)
    scales = torch.stack(
        [search_scale(block, bits) for block in torch.split(weight, group_size, dim=1)], dim=1
    )
    steps = scales.double().repeat_interleave(group_size, dim=1)
    height, width = -(-rows // SIDE), -(-columns // SIDE)  # in blocks
    margin = (0, width * SIDE - columns, 0, height * SIDE - rows)
    # the first row is the last one here: what depends on nothing that is open is a diagonal then
    weight = nn.functional.pad(weight, margin).flip(0)
    steps = nn.functional.pad(steps, margin, value=1).flip(0)
    inner = pad_factor(inverse_factor(hessian), margin[1])
    across = pad_factor(inverse_factor(outer), margin[3]).flip(0, 1)
    inner_blocks, across_blocks = diagonal_blocks(inner, 0), diagonal_blocks(across, 0)
    codes = torch.zeros_like(weight, dtype=torch.int8)
    within, between = torch.zeros_like(weight), torch.zeros_like(weight)  # errors; 0: still open
    rounded: Callable[..., tuple[torch.Tensor, ...]] = partial(round_blocks, limit=limit)
    if weight.is_cuda:
        largest = weight.new_ones(min(height, width), SIDE, SIDE)
        rounded = Recorded(rounded, *5 * [largest])
    for offset, downs, rights in diagonals(height, width):
        left, below = (rights.stop - 1) * SIDE, (downs.start + 1) * SIDE
        owed = torch.bmm(
            within.view(height, SIDE, -1)[downs, :, :left],
            inner.view(-1, width, SIDE)[:left, rights].transpose(0, 1),
        )
        target = diagonal_blocks(weight, offset) - torch.bmm(
            across.view(-1, height, SIDE)[below:, downs].permute(1, 2, 0),
            between.view(-1, width, SIDE)[below:, rights].transpose(0, 1),
        )
        step = diagonal_blocks(steps, offset)
        made = rounded(target, owed, step, inner_blocks[rights], across_blocks[downs])
        for whole, blocks in zip((codes, within, between), made, strict=True):
            diagonal_blocks(whole, offset).copy_(blocks)
    return codes.flip(0)[:rows, :columns], scales


def pad_factor(factor: torch.Tensor, margin: int) -> torch.Tensor:
    """Add rows and columns of the identity at the end of a square matrix."""
    padded = nn.functional.pad(factor, (0, margin, 0, margin))
    padded.diagonal()[len(factor) :] = 1
    return padded


def diagonals(height: int, width: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the diagonals of a matrix from its lower left to its upper right corner.

    Yields
    ------
    tuple
        Offset as of `torch.diagonal`, and the rows and the columns that it crosses.
    """
    for offset in range(1 - height, width):
        top, left = max(0, -offset), max(0, offset)
        length = min(height - top, width - left)
        yield offset, slice(top, top + length), slice(left, left + length)


def diagonal_blocks(matrix: torch.Tensor, offset: int) -> torch.Tensor:
    """Return a view [blocks, SIDE, SIDE] of the blocks of a matrix on one diagonal of blocks."""
    height, width = (size // SIDE for size in matrix.shape)
    return matrix.view(height, SIDE, width, SIDE).diagonal(offset, 0, 2).permute(2, 0, 1)


def round_blocks(
    target: torch.Tensor,
    owed: torch.Tensor,
    steps: torch.Tensor,
    inner: torch.Tensor,
    across: torch.Tensor,
    limit: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round blocks of a weight, the last row first; the rows above and the columns on the right make up.

    Parameters
    ----------
    target
        Float64 [blocks, SIDE, SIDE]: the weights, with what they make up for the rows that are done.
    owed
        What they make up for the columns of other blocks besides.
    steps
        What one step of a code is worth.
    inner, across
        Each block's part of `inverse_factor` over columns, and over rows, which go from the last to
        the first.
    limit
        What codes are below, and not below the negative of.

    Returns
    -------
    tuple
        Codes, int8, and errors that other columns, and other rows, must make up for, float64; of the
        blocks' shape.
    """
    target, owed = target.clone(), owed.clone()
    codes = torch.empty_like(target, dtype=torch.int8)
    within, between = torch.empty_like(target), torch.empty_like(target)
    inner_diagonal, across_diagonal = (part.diagonal(0, 1, 2) for part in (inner, across))
    for offset, rows, columns in diagonals(SIDE, SIDE):
        goal, step = target.diagonal(offset, 1, 2), steps.diagonal(offset, 1, 2)
        wanted = goal - owed.diagonal(offset, 1, 2)
        code = (wanted / step).round_().clamp_(-limit, limit - 1)
        value = code * step
        sideways = (wanted - value).div_(inner_diagonal[:, columns])
        upwards = (goal - value).div_(across_diagonal[:, rows])
        for whole, part in ((codes, code), (within, sideways), (between, upwards)):
            whole.diagonal(offset, 1, 2).copy_(part)
        # what is done is written to as well, and not looked at again
        owed[:, rows].addcmul_(sideways.unsqueeze(2), inner[:, columns])
        target[:, :, columns].addcmul_(
            across[:, rows].transpose(1, 2), upwards.unsqueeze(1), value=-1
        )
    return codes, within, between


def round_group(
    block: torch.Tensor, factors: torch.Tensor, scale: torch.Tensor, limit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of one group, those to come within it making up for each one's error.

    Parameters
    ----------
    block
        Float64 [out_features, group_size]; changed.
    factors
        Float64 [group_size, group_size]: the group's part of `inverse_factor`.
    scale
        Float64 [out_features].
    limit
        What codes are below, and not below the negative of: an integer, or [out_features].

    Returns
    -------
    tuple
        Codes, int8, and what columns of later groups must make up for, float64; of the block's shape.
    """
    codes, errors = torch.empty_like(block, dtype=torch.int8), torch.empty_like(block)
    for place in range(block.shape[1]):
        column, following = block[:, place], factors[place, place:]
        code = (column / scale).round_().clamp_(-limit, limit - 1)
        error = (column - code * scale) / following[0]
        block[:, place:] -= error.outer(following)
        codes[:, place], errors[:, place] = code, error
    return codes, errors


class Recorded:
    """A function of tensors as a CUDA graph: a GPU waits for launches otherwise.

    On an H100, GPTQ of a decoder layer of the 4B model's shapes would start some 100,000 kernels.

    Parameters
    ----------
    function
        Gives tensors; what it changes of its arguments are copies.
    examples
        Tensors of the largest shapes that it will be given.
    """

    def __init__(
        self, function: Callable[..., tuple[torch.Tensor, ...]], *examples: torch.Tensor
    ) -> None:
        self._inputs = tuple(tensor.clone() for tensor in examples)
        device = examples[0].device
        side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function(*self._inputs)  # what is set up at first use is not recorded
        torch.cuda.current_stream(device).wait_stream(side)
        # the card of the tensors need not be the current one, and torch's own stream for recording
        # stays on the card of the first graph of the process
        with torch.cuda.device(device):
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side):
                self._outputs = function(*self._inputs)

    def __call__(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Do as the function does; outputs hold until the next call.

        Tensors may be shorter in their first dimension than the examples, if the function treats each
        of its entries alone; outputs are as long as the first of them then.
        """
        for place, tensor in zip(self._inputs, given, strict=True):
            place[: len(tensor)].copy_(tensor)
        self._graph.replay()
        return tuple(output[: len(given[0])] for output in self._outputs)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of a damped Hessian.

    Its row i, from the diagonal on, is the first row of the inverse of the Hessian without the
    inputs before i, divided by the root of that row's first number.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1  # an input that is always 0: any code will do
    diagonal += DAMPING * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def search_scale(weight: torch.Tensor, bits: int | torch.Tensor) -> torch.Tensor:
    """Return the scale of one group of each row that rounds it with the smallest squared error.

    Parameters
    ----------
    weight
        Float64 [out_features, group_size].
    bits
        Bits of one weight, for all rows or as an integer tensor [out_features].

    Returns
    -------
    torch.Tensor
        Float16 [out_features]: a factor of `SHRINKAGE` times what `round_to_nearest` takes.
    """
    if isinstance(bits, torch.Tensor):
        scales = weight.new_empty(len(weight), dtype=torch.float16)
        for width in sorted(set(bits.tolist())):
            rows = bits == width
            scales[rows] = search_scale(weight[rows], int(width))
        return scales
    limit = 2 ** (bits - 1)
    _, largest = round_to_nearest(weight, bits, weight.shape[1])
    candidates = (largest.double() * SHRINKAGE.to(weight.device)).half()  # [out_features, factors]
    candidates = torch.where(candidates.abs() < SMALLEST_SCALE, largest, candidates)
    errors = []
    for scale in candidates.double().T.unsqueeze(-1):
        rounded = (weight / scale).round_().clamp_(-limit, limit - 1).mul_(scale)
        errors.append((rounded - weight).square_().sum(-1))
    best = torch.stack(errors, dim=1).argmin(dim=1, keepdim=True)
    return candidates.gather(1, best).squeeze(1)
