"""The Triton kernels against the plain functions that they stand for; they need a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from colqwen3.serving import fused

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("Triton kernels need a GPU", allow_module_level=True)

from colqwen3.serving import early_kernels as kernels

TOLERANCES = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-5}


@pytest.fixture(params=[True, False], ids=["early", "one after the other"])
def early(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels start early, or not, as on GPUs that cannot."""
    if not request.param:
        monkeypatch.setattr(kernels, "starts_early", lambda device: False)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def draw_angles(tokens: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.rand(tokens, size // 2) * 6
    angles = torch.cat((half, half), -1).cuda()
    return angles.cos().to(dtype), angles.sin().to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=2 * tolerance, rtol=tolerance)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (26, 2560), (1291, 2560), (7, 96)])
def test_norms(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, change = draw(tokens, width, dtype=dtype), draw(tokens, width, dtype=dtype)
    weight = draw(width, dtype=dtype)
    torch.cuda.synchronize()  # kernels read a weight before the last one has ended
    total, normed = kernels.add_rms_norm(x, change, weight, 1e-6)
    expected_total, expected = fused.add_rms_norm(x, change, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert_near(normed, expected)
    assert_near(kernels.rms_norm(x, weight, 1e-6), fused.rms_norm(x, weight, 1e-6))


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 9728), (208, 9728), (3, 2049), (70000, 16)])
def test_gate(tokens: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = draw(tokens, 2 * width, dtype=dtype)
    assert_near(kernels.gate(gate_up), fused.gate(gate_up))


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("tokens", "heads", "key_heads", "size"),
    [(1291, 32, 8, 128), (5, 7, 3, 96), (3, 4, 4, 32), (2, 8, 1, 64), (70000, 2, 1, 16)],
)
def test_heads_are_normed_and_rotated(
    tokens: int, heads: int, key_heads: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    qkv = draw(tokens, heads + 2 * key_heads, size, dtype=dtype)
    norms = draw(size, dtype=dtype), draw(size, dtype=dtype)
    given = (qkv, *norms, *draw_angles(tokens, size, dtype), heads, 1e-6)
    torch.cuda.synchronize()
    pairs = zip(kernels.rotate_heads(*given), fused.rotate_heads(*given), strict=True)
    for actual, expected in pairs:
        assert_near(actual, expected)


def test_each_kernel_waits_for_what_it_reads() -> None:
    # a kernel that read or wrote too early would give another result than one by one, sometimes
    torch.manual_seed(0)
    tokens, width, heads, key_heads, size = 3000, 1024, 8, 4, 64
    weight, q_norm, k_norm = draw(width), draw(size), draw(size)
    cos, sin = draw_angles(tokens, size, torch.bfloat16)
    wide, narrow = draw(4096, width) / 32, draw(width, 2048) / 45
    x, change = draw(tokens, width), draw(tokens, width)

    def chain(pause: Callable[[], object]) -> torch.Tensor:
        total, normed = x, change
        for _ in range(4):
            total, normed = kernels.add_rms_norm(total, normed, weight, 1e-6)
            pause()
            qkv = normed.view(tokens, heads + 2 * key_heads, size)
            q, _ = kernels.rotate_heads(qkv, q_norm, k_norm, cos, sin, heads, 1e-6)
            pause()
            gated = kernels.gate(functional.linear(normed, wide))
            pause()
            normed = functional.linear(gated, narrow)
            normed[:, : heads * size] += q.flatten(1)
            pause()
        return normed

    chain(torch.cuda.synchronize)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = chain(lambda: None)
    for _ in range(10):
        x.copy_(draw(tokens, width))  # what was read too early would be of the last turn
        change.copy_(draw(tokens, width))
        torch.cuda.synchronize()
        expected = chain(torch.cuda.synchronize)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(actual, expected)
