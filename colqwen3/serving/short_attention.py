"""Norm, rotation and causal attention of a short sequence in one Triton kernel.

For a query of some thirty tokens these are four kernels of a few microseconds, nearly all of it
launches. One program does one head of one sequence; keys and values fit in registers.
"""


# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# what Triton compiles has types of its own

import torch
import triton
import triton.language as tl

from colqwen3.serving.early_kernels import (
    await_previous,
    let_next_start,
    norm_and_rotate,
    starts_early,
)


@triton.jit
def _attend(
    qkv, q_norm, k_norm, cos, sin, out,
    tokens, heads, key_heads, eps, scale,
    ROWS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip  # pragma: no cover - runs on a GPU
    sequence, head = tl.program_id(0), tl.program_id(1)
    key_head = heads + head // (heads // key_heads)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, HALF)
    inside = (rows < tokens)[:, None]
    width: tl.constexpr = 2 * HALF
    token = sequence * tokens + rows
    line = (token * (heads + 2 * key_heads) * width)[:, None] + columns[None, :]
    angle = (token * width)[:, None] + columns[None, :]
    cos_low = tl.load(cos + angle, mask=inside, other=0.0)
    sin_low = tl.load(sin + angle, mask=inside, other=0.0)
    q_norm_low = tl.load(q_norm + columns)[None, :]
    q_norm_high = tl.load(q_norm + HALF + columns)[None, :]
    k_norm_low = tl.load(k_norm + columns)[None, :]
    k_norm_high = tl.load(k_norm + HALF + columns)[None, :]
    let_next_start(EARLY)
    await_previous(EARLY)  # what was read so far is no result of the last kernel
    q = qkv + line + head * width
    q_low = tl.load(q, mask=inside, other=0.0).to(tl.float32)
    q_high = tl.load(q + HALF, mask=inside, other=0.0).to(tl.float32)
    k = qkv + line + key_head * width
    k_low = tl.load(k, mask=inside, other=0.0).to(tl.float32)
    k_high = tl.load(k + HALF, mask=inside, other=0.0).to(tl.float32)
    v = qkv + line + (key_head + key_heads) * width
    v_low = tl.load(v, mask=inside, other=0.0)
    v_high = tl.load(v + HALF, mask=inside, other=0.0)
    q1, q2 = norm_and_rotate(q_low, q_high, q_norm_low, q_norm_high, cos_low, sin_low, HALF, eps)
    k1, k2 = norm_and_rotate(k_low, k_high, k_norm_low, k_norm_high, cos_low, sin_low, HALF, eps)
    scores = (tl.dot(q1, tl.trans(k1)) + tl.dot(q2, tl.trans(k2))) * scale
    scores = tl.where(rows[:, None] >= rows[None, :], scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    weights = (scores / tl.sum(scores, 1)[:, None]).to(q1.dtype)
    place = out + ((token * heads + head) * width)[:, None] + columns[None, :]
    tl.store(place, tl.dot(weights, v_low).to(q1.dtype), mask=inside)
    tl.store(place + HALF, tl.dot(weights, v_high).to(q1.dtype), mask=inside)


def short_attention(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float,
    tokens: int,
) -> torch.Tensor:
    """Norm and rotate queries and keys, and attend causally within each sequence.

    Parameters
    ----------
    qkv
        [sequences x tokens, heads + 2 x key heads, head_dim]; head_dim a power of two from 32.
    q_norm, k_norm
        [head_dim].
    cos, sin
        [sequences x tokens, head_dim], the same in both halves.
    heads
        Of the queries.
    eps
        Of the norms.
    tokens
        Of each sequence; beyond 64, registers run out.

    Returns
    -------
    torch.Tensor
        [sequences x tokens, heads x head_dim].
    """
    total, width = qkv.shape[0], qkv.shape[2]
    out = torch.empty(total, heads * width, dtype=qkv.dtype, device=qkv.device)
    early = starts_early(qkv.device)
    _attend[total // tokens, heads](
        qkv, q_norm, k_norm, cos, sin, out,
        tokens, heads, (qkv.shape[1] - heads) // 2, eps, width**-0.5,
        ROWS=max(16, triton.next_power_of_2(tokens)), HALF=width // 2, EARLY=early, launch_pdl=early,
    )  # fmt: skip
    return out
