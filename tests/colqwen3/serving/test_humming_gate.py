"""A product with a gate at its end against the product and the gate; needs a GPU and humming."""

import pytest
import torch

from colqwen3.checkpoint.packing import dequantize, pack
from colqwen3.serving import fused, linears
from colqwen3.serving.humming_tiles import choose_gated_tile, gate_beyond, gated_ranges, split_tiles

if not torch.cuda.is_available():
    pytest.skip("humming needs a GPU", allow_module_level=True)
pytest.importorskip("humming")

from colqwen3.serving import early_kernels

INPUTS, WIDTH, GROUP_SIZE = 2560, 9728, 128  # compiled for another test too


@pytest.fixture(scope="module")
def parts() -> linears.Parts:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (2 * WIDTH, INPUTS), dtype=torch.int8, generator=generator)
    scales = torch.rand(2 * WIDTH, INPUTS // GROUP_SIZE, generator=generator).half() * 0.02
    return {name: part.cuda() for name, part in pack(codes, scales, 4).items()}


def test_it_gives_the_bits_of_two_kernels(parts: linears.Parts) -> None:
    product = linears.humming_product(parts, 4)
    assert product
    sums = linears.GateSums()
    with_gate = linears.humming(parts, 4, GROUP_SIZE, torch.bfloat16, gate=sums)
    with pytest.MonkeyPatch.context() as patch:  # whole tiles, whose sums are in the same order
        patch.setattr(linears, "replace_tiles", lambda own, product: gated_ranges(product, 1 << 30))
        plain = linears.humming(parts, 4, GROUP_SIZE, torch.bfloat16)
    for tokens in (257, 300, 1291, 5000, 9000):
        x = torch.randn(tokens, INPUTS, device="cuda", dtype=torch.bfloat16)
        made = with_gate(x)
        assert isinstance(made, linears.Gated)
        assert made.values.shape == (tokens, WIDTH)
        assert torch.equal(made.values, early_kernels.gate(plain(x)))
    assert choose_gated_tile(product, 5000) != choose_gated_tile(product, 304)
    few = torch.randn(gate_beyond(product), INPUTS, device="cuda", dtype=torch.bfloat16)
    assert with_gate(few).shape == (len(few), 2 * WIDTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_split_tiles_are_added_up(
    parts: linears.Parts, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = linears.humming_product(parts, 4)
    assert product
    few = [each for each in gated_ranges(product, 1 << 30) if each.beyond < 256]
    monkeypatch.setattr(
        linears, "gated_ranges", lambda *_: [*few[:-1], few[-1]._replace(up_to=1 << 30)]
    )
    sums = linears.GateSums()
    with_gate = linears.humming(parts, 4, GROUP_SIZE, dtype, gate=sums)
    (kept,) = sums._kept.values()
    weight = dequantize(**parts, bits=4)
    for tokens in (193, 208, 229, 256):
        assert 0 < split_tiles(product, tokens, choose_gated_tile(product, tokens)) < 152
        x = torch.randn(tokens, INPUTS, device="cuda", dtype=dtype)
        expected = fused.gate(x.float() @ weight.T)
        for _ in range(20):  # what one leaves behind, the next one would have
            error = with_gate(x).values.float() - expected
            assert error.norm() < 0.01 * expected.norm()
            assert linears.local_error(error, expected) < 0.05
            assert not kept.any()
