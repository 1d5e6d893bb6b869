"""What a forward does between its linears, in plain torch; on a GPU each is one kernel."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from colqwen3.serving.gate_features import run_length
from colqwen3.serving.int8 import Int8Tokens, quantize_tokens, rotate

Operation = Callable[..., Any]


class Operations(NamedTuple):
    """The functions below or kernels for them, and what does several of them at once.

    Those that give the inputs of the decoder's linears may give them in 8 bits: `rms_norm`,
    `add_rms_norm`, `gate` and `attended`. `last_norm` is `add_rms_norm` in 16 bits.
    """

    rms_norm: Operation
    add_rms_norm: Operation
    rotate_heads: Operation
    gate: Operation
    attended: Operation
    last_norm: Operation
    add_layer_norm: Operation
    rotate_vision: Operation
    gelu: Operation
    short_attention: Operation | None = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension by its root mean square, in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of a residual and its change [tokens, hidden], and the norm of it."""
    x = x + change
    return x, rms_norm(x, weight, eps)


def add_layer_norm(
    x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of a residual and its change [patches, hidden], and the layer norm of it."""
    x = x + change
    return x, functional.layer_norm(x, weight.shape, weight, bias, eps=1e-6)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return ``(-second half, first half)`` of the last dimension."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate_heads(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise each head of queries and keys, and rotate it by its position.

    Parameters
    ----------
    qkv
        [tokens, heads + 2 x key heads, head_dim].
    q_norm, k_norm
        [head_dim].
    cos, sin
        [tokens, head_dim].
    heads
        Of the queries.
    eps
        Of the norms.

    Returns
    -------
    tuple
        [tokens, heads, head_dim] and [tokens, key heads, head_dim].
    """
    both = (qkv.shape[1] + heads) // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q = rms_norm(qkv[:, :heads], q_norm, eps)
    k = rms_norm(qkv[:, heads:both], k_norm, eps)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def rotate_vision(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys of the vision tower, in float32.

    Parameters
    ----------
    qkv
        [patches, 3, heads, head_dim].
    cos, sin
        [patches, head_dim].

    Returns
    -------
    tuple
        [patches, heads, head_dim], twice.
    """
    wide = qkv[:, :2].float()
    cos, sin = cos[:, None, None], sin[:, None, None]
    q, k = (wide * cos + rotate_half(wide) * sin).to(qkv.dtype).unbind(1)
    return q, k


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """Return SiLU of some features times others.

    Parameters
    ----------
    gate_up
        [tokens, 2 x features], in the order of `gate_features.alternate`.

    Returns
    -------
    torch.Tensor
        [tokens, features].
    """
    run = run_length(gate_up.shape[-1] // 2)
    first, second = gate_up.view(*gate_up.shape[:-1], -1, 2, run).unbind(-2)
    product: torch.Tensor = functional.silu(first) * second
    return product.flatten(-2)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Return GELU by its tanh approximation."""
    return functional.gelu(x, approximate="tanh")


def unchanged(x: torch.Tensor) -> torch.Tensor:
    """Return `x`."""
    return x


PLAIN = Operations(
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rotate_heads=rotate_heads,
    gate=gate,
    attended=unchanged,
    last_norm=add_rms_norm,
    add_layer_norm=add_layer_norm,
    rotate_vision=rotate_vision,
    gelu=gelu,
)


def _compile(function: Operation) -> Operation:
    """Compile a function for any number of rows in its tensors, once for each of their widths."""
    compiled: dict[Any, Operation] = {}

    def call(first: torch.Tensor, *others: Any) -> Any:
        key = first.shape[1:], first.dtype, first.device
        kernel = compiled.get(key)
        if kernel is None:
            # a code object of its own: torch gives up after compiling one eight times
            code = FunctionType(function.__code__.replace(), function.__globals__)
            # kernels chosen by timing would add up in another order from process to process
            options: dict[str, Any] = {"triton.enable_pdl": True, "deterministic": True}
            kernel = compiled[key] = torch.compile(code, fullgraph=True, options=options)
            for value in (first, *others):
                if isinstance(value, torch.Tensor) and len(value) == len(first):
                    torch._dynamo.maybe_mark_dynamic(value, 0)
        return kernel(first, *others)

    return call


@functools.cache
def gpu_operations() -> Operations:
    """Return kernels of our own for the decoder, and the vision tower's functions compiled."""
    from colqwen3.serving import early_kernels as kernels
    from colqwen3.serving.short_attention import short_attention

    return Operations(
        rms_norm=kernels.rms_norm,
        add_rms_norm=kernels.add_rms_norm,
        rotate_heads=kernels.rotate_heads,
        gate=kernels.gate,
        attended=unchanged,
        last_norm=kernels.add_rms_norm,
        add_layer_norm=_compile(add_layer_norm),
        rotate_vision=_compile(rotate_vision),
        gelu=_compile(gelu),
        short_attention=short_attention,
    )


def int8_operations(base: Operations, device: torch.device) -> Operations:
    """Return operations that give the decoder's linears inputs in 8 bits, the others of `base`."""
    if device.type == "cuda":
        from colqwen3.serving import int8_kernels as kernels

        return base._replace(
            rms_norm=kernels.rms_norm,
            add_rms_norm=kernels.add_rms_norm,
            gate=kernels.gate,
            attended=kernels.quantize_tokens,
        )

    def add_rms_norm(*values: Any) -> tuple[torch.Tensor, Int8Tokens]:
        x, normed = base.add_rms_norm(*values)
        return x, quantize_tokens(normed)

    return base._replace(
        rms_norm=lambda *values: quantize_tokens(base.rms_norm(*values)),
        add_rms_norm=add_rms_norm,
        gate=lambda gate_up: quantize_tokens(rotate(base.gate(gate_up))),
        attended=quantize_tokens,
    )


def choose_operations(device: torch.device) -> Operations:
    """Return kernels on a GPU, else the plain functions."""
    return gpu_operations() if device.type == "cuda" else PLAIN
