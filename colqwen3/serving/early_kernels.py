"""What a decoder layer does between its linears, in Triton kernels that let the next one start early.

Each is over in a few microseconds, about what the next kernel needs to start and set itself up. So
each lets that begin at once, before it waits for the last one ("programmatic dependent launch");
humming's kernels wait in turn before they read what was computed. torch.compile makes such kernels
too, but lets the next one start only when it has read its inputs.

Weights, cosines and sines are read before the wait: the kernel just before must not write them.
Tensors are contiguous.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# what Triton compiles has types of its own

import functools

import torch
import triton
import triton.language as tl

from colqwen3.serving.gate_features import run_length

EARLY_FROM = (9, 0)
"""Capability of the GPUs that can start a kernel while the last one is finishing."""
GATE_BLOCK, GATE_WARPS = 2048, 8
"""Features and warps of a program of the gate."""
HEADS_BLOCK = 8
"""Heads of a program of the rotation."""


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether kernels can start before the last one has ended on this GPU."""
    return torch.cuda.get_device_capability(device) >= EARLY_FROM


@triton.jit
def let_next_start(EARLY: tl.constexpr):  # pragma: no cover - on a GPU
    """Let the next kernel start once all programs of this one have come here."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_previous(EARLY: tl.constexpr):  # pragma: no cover - on a GPU
    """Wait until the last kernel has ended, and what it wrote can be read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def norm_and_rotate(
    low, high, low_weight, high_weight, cos, sin, half, eps
):  # pragma: no cover - on a GPU
    """Norm rows of heads by their root mean square, and rotate them by their positions.

    `low` and `high` are the two halves of each head, float32 [rows, columns], 0 beyond `half`
    columns; the results are of the type of the weights.
    """
    kind = low_weight.dtype
    size = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    scale = tl.rsqrt(size / (2 * half) + eps)[:, None]
    low, high = (low * scale).to(kind) * low_weight, (high * scale).to(kind) * high_weight
    # the two halves of the angles are alike
    return (low * cos - high * sin).to(kind), (high * cos + low * sin).to(kind)


@triton.jit
def _add_norm(
    x, change, weight, total, out, width, eps,
    BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip  # pragma: no cover - on a GPU
    row, columns = tl.program_id(0).to(tl.int64) * width, tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(weight + columns, mask=inside, other=0.0)
    let_next_start(EARLY)
    await_previous(EARLY)
    value = tl.load(x + row + columns, mask=inside, other=0.0)
    if ADD:
        value = value + tl.load(change + row + columns, mask=inside, other=0.0)
        tl.store(total + row + columns, value, mask=inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide) / width + eps)
    tl.store(out + row + columns, wide.to(value.dtype) * factor, mask=inside)


@triton.jit
def _gate(
    gate_up, out, width, RUN: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip  # pragma: no cover - on a GPU
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    run = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK // RUN)[:, None] * RUN
    columns = run + tl.arange(0, RUN)[None, :]
    inside = columns < width
    place = gate_up + token * 2 * width + 2 * run + tl.arange(0, RUN)[None, :]
    let_next_start(EARLY)
    await_previous(EARLY)
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + RUN, mask=inside, other=0.0)
    wide = first.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(first.dtype)
    tl.store(out + token * width + columns, silu * second, mask=inside)


@triton.jit
def _rotate(
    qkv, q_norm, k_norm, cos, sin, q_out, k_out, heads, key_heads, eps,
    ROWS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip  # pragma: no cover - on a GPU
    blocks, width = tl.cdiv(heads + key_heads, ROWS), 2 * HALF
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    half = columns < HALF
    of_query, of_key = (head < heads)[:, None], (head >= heads)[:, None]
    inside = (head < heads + key_heads)[:, None] & half[None, :]
    cos_row = tl.load(cos + token * width + columns, mask=half, other=0.0)[None, :]
    sin_row = tl.load(sin + token * width + columns, mask=half, other=0.0)[None, :]
    q_low = tl.load(q_norm + columns, mask=half, other=0.0)[None, :]
    q_high = tl.load(q_norm + HALF + columns, mask=half, other=0.0)[None, :]
    k_low = tl.load(k_norm + columns, mask=half, other=0.0)[None, :]
    k_high = tl.load(k_norm + HALF + columns, mask=half, other=0.0)[None, :]
    low_factor, high_factor = tl.where(of_query, q_low, k_low), tl.where(of_query, q_high, k_high)
    let_next_start(EARLY)
    await_previous(EARLY)
    place = qkv + (token * (heads + 2 * key_heads) + head)[:, None] * width + columns[None, :]
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    first, second = norm_and_rotate(low, high, low_factor, high_factor, cos_row, sin_row, HALF, eps)
    q_place = q_out + (token * heads + head)[:, None] * width + columns[None, :]
    tl.store(q_place, first, mask=inside & of_query)
    tl.store(q_place + HALF, second, mask=inside & of_query)
    k_place = k_out + (token * key_heads + head - heads)[:, None] * width + columns[None, :]
    tl.store(k_place, first, mask=inside & of_key)
    tl.store(k_place + HALF, second, mask=inside & of_key)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Do as `fused.rms_norm` on [tokens, hidden]."""
    out = torch.empty_like(x)
    _run_norm(x, x, weight, x, out, eps, add=False)
    return out


def add_rms_norm(
    x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `fused.add_rms_norm` on [tokens, hidden]."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _run_norm(x, change, weight, total, out, eps, add=True)
    return total, out


def _run_norm(
    x: torch.Tensor,
    change: torch.Tensor,
    weight: torch.Tensor,
    total: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    add: bool,
) -> None:
    assert all(part.is_contiguous() for part in (x, change, weight))
    (tokens, width), early = x.shape, starts_early(x.device)
    _add_norm[(tokens,)](
        x, change, weight, total, out, width, eps,
        BLOCK=triton.next_power_of_2(width), ADD=add, EARLY=early, launch_pdl=early,
    )  # fmt: skip


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """Do as `fused.gate` on [tokens, 2 x features]."""
    assert gate_up.is_contiguous()
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out, early = gate_up.new_empty(tokens, width), starts_early(gate_up.device)
    _gate[tokens * triton.cdiv(width, GATE_BLOCK),](
        gate_up, out, width,
        RUN=run_length(width), BLOCK=GATE_BLOCK, EARLY=early, launch_pdl=early, num_warps=GATE_WARPS,
    )  # fmt: skip
    return out


def rotate_heads(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `fused.rotate_heads`; cos and sin are the same in both halves."""
    assert all(part.is_contiguous() for part in (qkv, cos, sin))
    tokens, rows, width = qkv.shape
    key_heads = (rows - heads) // 2
    q, k = qkv.new_empty(tokens, heads, width), qkv.new_empty(tokens, key_heads, width)
    early = starts_early(qkv.device)
    _rotate[tokens * triton.cdiv(heads + key_heads, HEADS_BLOCK),](
        qkv, q_norm, k_norm, cos, sin, q, k, heads, key_heads, eps,
        ROWS=HEADS_BLOCK, HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2),
        EARLY=early, launch_pdl=early,
    )  # fmt: skip
    return q, k
