"""A quantized linear whose group scales and codes are tuned by gradients."""

from typing import Any

import torch
from torch import nn

from colqwen3.checkpoint.packing import pack

MAX_OFFSET = 0.45
"""Of a code at the start, in steps; at 0.5 it would be the next code."""


class _Weight(torch.autograd.Function):
    """The weight of a linear from codes that are tuned; gradients pass straight through rounding."""

    @staticmethod
    def forward(
        ctx: Any, codes: torch.Tensor, offset: torch.Tensor, change: torch.Tensor,
        scales: torch.Tensor, bits: int,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(codes, offset, change, scales)
        ctx.bits = bits
        tuned = tuned_scales(scales, change).float()
        groups = tuned_codes(codes, offset, bits).float().view(*scales.shape, -1)
        return (groups * tuned.unsqueeze(-1)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, offset, change, scales = ctx.saved_tensors
        limit = 2 ** (ctx.bits - 1)
        gradient = gradients[0].view(*scales.shape, -1)
        tuned = tuned_scales(scales, change).float()
        groups = tuned_codes(codes, offset, ctx.bits).float().view(*scales.shape, -1)
        of_change = (gradient * groups).sum(-1) * scales.float()
        if not ctx.needs_input_grad[1]:
            return None, None, of_change, None, None
        wanted = codes + offset
        inside = (wanted >= -limit - 0.5) & (wanted <= limit - 0.5)
        of_offset = (gradient * tuned.unsqueeze(-1)).view_as(offset) * inside
        return None, of_offset, of_change, None, None


def tuned_codes(codes: torch.Tensor, offset: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes as tuned: `codes` plus float `offset` of the same shape, rounded, as int8."""
    limit = 2 ** (bits - 1)
    if not offset.numel():
        return codes
    return (codes + offset).round_().clamp_(-limit, limit - 1).to(torch.int8)


def tuned_scales(scales: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Return scales as tuned, float16: `scales` times 1 + `change`, float of the same shape."""
    return (scales.float() * (1 + change)).half()


class TunedLinear(nn.Module):
    """A linear of which the group scales, and the codes if wanted, are tuned.

    Parameters
    ----------
    codes
        Int8 [out_features, in_features].
    scales
        Float16 [out_features, groups].
    bits
        Bits of a code.
    weight
        The original float [out_features, in_features], for the codes to be tuned; None leaves them
        as they are. How far it is from its code, in steps, is how far the code is from the next one.
    bias
        [out_features] or None; stays.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bits: int,
        weight: torch.Tensor | None = None,
        bias: Any = None,
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bits, self.bias = bits, bias
        self.change = nn.Parameter(torch.zeros(scales.shape))
        offset = torch.empty(0)
        if weight is not None:
            steps = weight.detach().float().view(*scales.shape, -1) / scales.float().unsqueeze(-1)
            # within the code's own cell: at the start every code is what it was
            offset = (steps.flatten(1) - codes).clamp_(-MAX_OFFSET, MAX_OFFSET)
        self.offset = nn.Parameter(offset, requires_grad=weight is not None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] of tokens [..., in_features]."""
        weight = _Weight.apply(  # type: ignore[no-untyped-call]
            self.codes, self.offset, self.change, self.scales, self.bits
        )
        return nn.functional.linear(tokens, weight, self.bias)

    @torch.no_grad()
    def packed(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the checkpoint, as of `colqwen3.checkpoint.packing.pack`."""
        codes = tuned_codes(self.codes, self.offset, self.bits)
        return pack(codes, tuned_scales(self.scales, self.change), self.bits)
