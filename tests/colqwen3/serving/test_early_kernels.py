"""The Triton kernels against the plain functions that they stand for; they need a GPU."""

import pytest
import torch

from colqwen3.serving import fused

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("Triton kernels need a GPU", allow_module_level=True)

from colqwen3.serving import early_kernels as kernels


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (26, 2560), (1291, 2560), (7, 96)])
def test_norms(tokens: int, width: int) -> None:
    torch.manual_seed(0)
    x, change, weight = draw(tokens, width), draw(tokens, width), draw(width)
    total, normed = kernels.add_rms_norm(x, change, weight, 1e-6)
    expected_total, expected = fused.add_rms_norm(x, change, weight, 1e-6)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected, atol=0.02, rtol=0.02)
    expected = fused.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("tokens", "width"), [(1, 9728), (208, 9728), (3, 2049), (70000, 16)])
def test_gate(tokens: int, width: int) -> None:
    torch.manual_seed(0)
    gate_up = draw(tokens, 2 * width)
    actual, expected = kernels.gate(gate_up), fused.gate(gate_up)
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("tokens", "heads", "key_heads", "size"), [(1291, 32, 8, 128), (5, 7, 3, 96), (3, 4, 4, 32)]
)
def test_heads_are_normed_and_rotated(tokens: int, heads: int, key_heads: int, size: int) -> None:
    torch.manual_seed(0)
    qkv, q_norm, k_norm = draw(tokens, heads + 2 * key_heads, size), draw(size), draw(size)
    half = torch.rand(tokens, size // 2) * 6
    angles = torch.cat((half, half), -1).cuda()
    given = (qkv, q_norm, k_norm, angles.cos().bfloat16(), angles.sin().bfloat16(), heads, 1e-6)
    for actual, expected in zip(
        kernels.rotate_heads(*given), fused.rotate_heads(*given), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=0.04, rtol=0.02)


def test_results_do_not_depend_on_what_runs_before() -> None:
    # a kernel that started early must have waited for what it reads, and what follows for it
    torch.manual_seed(0)
    x, change, weight = draw(4000, 2560), draw(4000, 2560), draw(2560)
    expected = x
    for _ in range(20):
        expected = fused.add_rms_norm(expected, change, weight, 1e-6)[1]
    graph = torch.cuda.CUDAGraph()
    kernels.add_rms_norm(x, change, weight, 1e-6)
    with torch.cuda.graph(graph):
        actual = x
        for _ in range(20):
            actual = kernels.add_rms_norm(actual, change, weight, 1e-6)[1]
    graph.replay()
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.02
