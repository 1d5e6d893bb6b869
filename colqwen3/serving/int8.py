"""Linears on 8-bit activations: what they compute, in plain torch.

Activations are rounded to int8 with one scale a token, weights to int8 with one scale an output, so
that a product is one of integers. A 4-bit weight has a scale for each group of inputs; here that is
expressed in the scale of the output, by which the codes become integers of 8 bits.

What a gate gives has a few numbers far above the others, which would make the scale of all of a
token. It is rotated before it is rounded, sixteen features at a time, and the weight of `down` with
it: that spreads such a number over sixteen, and changes nothing else (Ashkboos et al., "QuaRot",
arXiv:2404.00456, does so with all features at once).
"""

from typing import NamedTuple

import torch

LIMIT = 127
"""Of the int8 values, symmetric."""
ROTATED = 16
"""Features that are rotated together: a multiple of it are in a row."""
ROWS = 256
"""Of a weight that are in float32 at a time."""
SMALLEST = 1e-8
"""What the largest of a token is taken to be at least."""


class Int8Tokens(NamedTuple):
    """Activations in 8 bits.

    Attributes
    ----------
    codes
        Int8 [tokens, features].
    scales
        Float32 [tokens]: what one step of each token's codes is worth.
    """

    codes: torch.Tensor
    scales: torch.Tensor


class Int8Weight(NamedTuple):
    """A weight in 8 bits.

    Attributes
    ----------
    codes
        Int8 [out_features, in_features].
    scales
        Float32 [out_features].
    """

    codes: torch.Tensor
    scales: torch.Tensor


def quantize_tokens(x: torch.Tensor) -> Int8Tokens:
    """Round activations [tokens, features] to nearest, the largest of each token to 127."""
    wide = x.float()
    largest = wide.abs().amax(-1).clamp_min(SMALLEST)
    # torch computes number / tensor as the tensor's reciprocal times the number, which rounds twice
    factors = wide.new_tensor(LIMIT) / largest
    codes = (wide * factors[:, None]).round().to(torch.int8)
    return Int8Tokens(codes, largest / LIMIT)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Multiply each `ROTATED` numbers of a row by the orthonormal Hadamard matrix: float32.

    It is its own inverse. Sums are made in pairs in the order of the GPU kernel that rotates weights,
    those of numbers next to each other first.
    """
    values: torch.Tensor = x.float().view(*x.shape[:-1], -1, 2, 2, 2, 2)
    for axis in (-1, -4, -3, -2):
        first, second = values.unbind(axis)
        values = torch.stack((first + second, first - second), axis)
    return values.flatten(-5) * 0.25  # 1 / root of sixteen


def quantize_weight(weight: torch.Tensor) -> Int8Weight:
    """Round a dense weight [out_features, in_features] to nearest, the largest of a row to 127."""
    return Int8Weight(*quantize_tokens(weight))


def channel_scales(scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the scale of each output in which the codes of all its groups fit into int8.

    Parameters
    ----------
    scales
        [groups, out_features], of either sign.
    bits
        Of the codes, which reach ``-2 ** (bits - 1)``.

    Returns
    -------
    torch.Tensor
        Float32 [out_features]: the scale furthest from zero over ``2 ** (8 - bits)``, so that the
        codes of its group become integers without rounding, and -128 the lowest.
    """
    wide = scales.float()
    furthest: torch.Tensor = wide.gather(0, wide.abs().argmax(0, keepdim=True)).squeeze(0)
    return furthest.masked_fill(furthest == 0, 1.0) * 2.0 ** (bits - 8)


def express_in_int8(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> Int8Weight:
    """Return a weight of few bits as one of 8 bits with one scale an output.

    Parameters
    ----------
    codes
        Integers [out_features, in_features] from ``-2 ** (bits - 1)``.
    scales
        [groups, out_features].
    bits
        Of the codes.

    Returns
    -------
    Int8Weight
        Each code times its scale over the output's, rounded to nearest; that ratio is in float16,
        as in the GPU kernel.
    """
    channels = channel_scales(scales, bits)
    ratios = (scales.float() * (1 / channels)).half().T.float()
    values = codes.float().view(*ratios.shape, -1) * ratios.unsqueeze(-1)
    # 128 comes of a group whose scale is as far from zero on the other side
    return Int8Weight(values.round().clamp_max(LIMIT).flatten(1).to(torch.int8), channels)


def rotate_into_int8(codes: torch.Tensor, scales: torch.Tensor) -> Int8Weight:
    """Return a weight of few bits, rotated, as one of 8 bits with one scale an output.

    Parameters
    ----------
    codes, scales
        As of `express_in_int8`; ratios are in float32 here.
    """
    channels = rotated_channel_scales(codes, scales)
    ratios = scales.float() * (1 / channels)
    return Int8Weight(_rotate_dense(codes, ratios).round().to(torch.int8), channels)


def rotated_channel_scales(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the scale of each output in which its rotated weights fit into int8.

    Parameters
    ----------
    codes, scales
        As of `express_in_int8`.

    Returns
    -------
    torch.Tensor
        Float32 [out_features].
    """
    parts = zip(torch.split(codes, ROWS), torch.split(scales.float(), ROWS, 1), strict=True)
    largest = torch.cat([_rotate_dense(*part).abs().amax(-1) for part in parts])
    return largest.clamp_min(SMALLEST) / LIMIT


def _rotate_dense(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    groups = codes.float().view(codes.shape[0], len(scales), -1)
    return rotate((groups * scales.T.unsqueeze(-1)).flatten(1))


def multiply(x: Int8Tokens, weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return the linear of 8-bit activations [tokens, out_features]; sums of integers are exact."""
    sums = torch._int_mm(x.codes, weight.codes.T).float()
    return (sums * (x.scales[:, None] * weight.scales)).to(dtype)
