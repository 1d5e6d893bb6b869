"""The Triton kernel against torch's attention; it needs a GPU."""

import pytest
import torch
from torch.nn import functional

from colqwen3.serving.fused import rotate_heads

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("Triton kernels need a GPU", allow_module_level=True)

from colqwen3.serving.short_attention import short_attention


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "key_heads", "size"),
    [(3, 26, 8, 2, 128), (1, 64, 4, 4, 64), (2, 5, 4, 1, 32)],
)
def test_equals_torch(batch: int, tokens: int, heads: int, key_heads: int, size: int) -> None:
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    qkv = torch.randn(batch * tokens, heads + 2 * key_heads, size, **options)  # type: ignore[call-overload]
    q_norm, k_norm = torch.rand(size, **options), torch.rand(size, **options)  # type: ignore[call-overload]
    half = torch.rand(tokens, size // 2) * 6
    angles = torch.cat((half, half), -1).repeat(batch, 1)
    cos, sin = angles.cos().to(**options), angles.sin().to(**options)  # type: ignore[call-overload]
    q, k = rotate_heads(qkv, q_norm, k_norm, cos, sin, heads, 1e-6)
    v = qkv[:, heads + key_heads :]
    q, k, v = (part.unflatten(0, (batch, tokens)).transpose(1, 2) for part in (q, k, v))
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = expected.transpose(1, 2).reshape(batch * tokens, -1)
    torch.cuda.synchronize()  # the kernel reads norms and angles before the last one has ended
    actual = short_attention(qkv, q_norm, k_norm, cos, sin, heads, 1e-6, tokens)
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)
