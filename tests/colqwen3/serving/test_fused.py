"""The functions between linears against the modules of transformers that they stand for."""

import shutil

import pytest
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextRMSNorm,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from colqwen3.serving import fused

# where serving compiles; on a CPU that takes a C++ compiler, and far longer
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_compiler = pytest.mark.skipif(
    DEVICE.type == "cpu" and shutil.which("g++") is None,
    reason="torch.compile needs a C++ compiler",
)


def angles(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.rand(tokens, size // 2) * 6
    both = torch.cat((half, half), -1)
    return both.cos(), both.sin()


def norm(size: int) -> Qwen3VLTextRMSNorm:
    result = Qwen3VLTextRMSNorm(size, eps=1e-6)
    result.weight.data = torch.rand(size)
    return result


@torch.no_grad()
def test_norms() -> None:
    x, change, module = torch.randn(5, 32), torch.randn(5, 32), norm(32)
    total, normed = fused.add_rms_norm(x, change, module.weight, 1e-6)
    assert torch.equal(total, x + change)
    assert torch.equal(normed, module(x + change))
    layer = torch.nn.LayerNorm(32, eps=1e-6)
    layer.weight.data, layer.bias.data = torch.rand(32), torch.rand(32)
    actual = fused.add_layer_norm(x, change, layer.weight, layer.bias)
    assert torch.equal(actual[1], layer(x + change))


@torch.no_grad()
def test_heads_are_normed_and_rotated() -> None:
    heads, key_heads, tokens, size = 4, 2, 6, 16
    qkv, (cos, sin) = torch.randn(tokens, heads + 2 * key_heads, size), angles(tokens, size)
    q_norm, k_norm = norm(size), norm(size)
    q = q_norm(qkv[:, :heads]).transpose(0, 1)[None]
    k = k_norm(qkv[:, heads : heads + key_heads]).transpose(0, 1)[None]
    expected = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    actual = fused.rotate_heads(qkv, q_norm.weight, k_norm.weight, cos, sin, heads, 1e-6)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1))


def test_vision_heads_are_rotated() -> None:
    qkv, (cos, sin) = torch.randn(6, 3, 4, 16), angles(6, 16)
    expected = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    for ours, theirs in zip(fused.rotate_vision(qkv, cos, sin), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gate_is_silu_of_some_features_times_others() -> None:
    actual = fused.gate(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))
    expected = torch.tensor([[3 / (1 + 2.718281828**-1), -8 / (1 + 2.718281828**2)]])
    torch.testing.assert_close(actual, expected)


def test_a_cpu_compiles_nothing() -> None:
    assert fused.choose_operations(torch.device("cpu")) is fused.PLAIN


@needs_compiler
def test_compiled_once_for_any_number_of_rows() -> None:
    # models of other widths in one process must neither compile anew for each size of batch nor
    # use up what torch allows
    compiled_gate = fused._compile(fused.gate)
    with torch._dynamo.config.patch(error_on_recompile=True, recompile_limit=1):
        for width in (8, 12):
            for tokens in (26, 104, 5):
                x = torch.randn(tokens, width, device=DEVICE)
                torch.testing.assert_close(compiled_gate(x), fused.gate(x))


@needs_compiler
def test_other_surroundings_do_not_compile_each_size() -> None:
    compiled_gate = fused._compile(fused.gate)
    with torch._dynamo.config.patch(recompile_limit=3):
        with torch.device("cpu"):
            compiled_gate(torch.randn(24, 8, device=DEVICE))
        for tokens in (26, 104, 5, 7, 9):
            x = torch.randn(tokens, 8, device=DEVICE)
            torch.testing.assert_close(compiled_gate(x), fused.gate(x))
