"""Linears on 8-bit activations: what they compute, in plain torch.

Activations are rounded to int8 with one scale a token, weights to int8 with one scale an output, so
that a product is one of integers. A 4-bit weight has a scale for each group of inputs; here that is
expressed in the scale of the output, by which the codes become integers of 8 bits.

What a gate gives has a few numbers far above the others: there each 128 features have a scale.
"""

from typing import Literal, NamedTuple

import torch
from torch.nn import functional

ActivationsKind = Literal["bfloat16", "int8"]
"""What the decoder's linears take: 16 bits, or 8 wherever that is faster."""
LIMIT = 127
"""Of the int8 values, symmetric."""


SEGMENT = 128
"""Features that share a scale in what a gate gives."""
SMALLEST = 1e-8
"""What the largest of a token is taken to be at least."""


class Int8Tokens(NamedTuple):
    """Activations in 8 bits.

    Attributes
    ----------
    codes
        Int8 [tokens, features].
    scales
        Float32 [tokens]: what one step of each token's codes is worth; or [tokens, segments], for
        each `SEGMENT` of features.
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
    codes = (wide * (LIMIT / largest)[:, None]).round().to(torch.int8)
    return Int8Tokens(codes, largest / LIMIT)


def quantize_segments(x: torch.Tensor) -> Int8Tokens:
    """Do as `quantize_tokens` with each `SEGMENT` of features; the last one may be shorter."""
    tokens, features = x.shape
    padded = functional.pad(x, (0, -features % SEGMENT))
    codes, scales = quantize_tokens(padded.view(-1, SEGMENT))
    return Int8Tokens(codes.view(tokens, -1)[:, :features], scales.view(tokens, -1))


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
        Float32 [out_features].
    """
    channels: torch.Tensor = scales.float().abs().amax(0).clamp_min(1e-30)
    return channels.mul_(2 ** (bits - 1) / LIMIT)


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
        Each code times its scale over the output's, rounded as a GPU kernel does: that ratio in
        float16, the sum with 1536 in float16, whose steps are integers there.
    """
    channels = channel_scales(scales, bits)
    ratios = (scales.float() * (1 / channels)).half().T.float()
    values = codes.float().view(*ratios.shape, -1) * ratios.unsqueeze(-1)
    return Int8Weight(values.round().flatten(1).to(torch.int8), channels)


def multiply(x: Int8Tokens, weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return the linear of 8-bit activations [tokens, out_features]; sums of integers are exact."""
    if x.scales.dim() == 1:
        sums = torch._int_mm(x.codes, weight.codes.T).float() * x.scales[:, None]
    else:
        pieces = zip(
            torch.split(x.codes, SEGMENT, 1),
            torch.split(weight.codes, SEGMENT, 1),
            x.scales.T,
            strict=True,
        )
        products = (
            torch._int_mm(codes.contiguous(), part.T).float() * scales[:, None]
            for codes, part, scales in pieces
        )
        sums = torch.stack(list(products)).sum(0)
    return (sums * weight.scales).to(dtype)
