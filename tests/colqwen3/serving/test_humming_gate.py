"""A product with a gate at its end against the product and the gate; needs a GPU and humming."""

import pytest
import torch

from colqwen3.checkpoint.packing import pack
from colqwen3.serving import linears
from colqwen3.serving.humming_tiles import WAVES_FROM, choose_gated_tile, gated_ranges

if not torch.cuda.is_available():
    pytest.skip("humming needs a GPU", allow_module_level=True)
pytest.importorskip("humming")

from colqwen3.serving import early_kernels


def test_it_gives_the_bits_of_two_kernels() -> None:
    inputs, width, group_size = 2560, 9728, 128  # compiled for another test too
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (2 * width, inputs), dtype=torch.int8, generator=generator)
    scales = torch.rand(2 * width, inputs // group_size, generator=generator).half() * 0.02
    parts = {name: part.cuda() for name, part in pack(codes, scales, 4).items()}
    product = linears.humming_product(parts, 4)
    assert product
    with_gate = linears.humming(parts, 4, group_size, torch.bfloat16, gate=True)
    with pytest.MonkeyPatch.context() as patch:  # whole tiles, whose sums are in the same order
        patch.setattr(linears, "replace_tiles", lambda own, product: gated_ranges(product, 1 << 30))
        plain = linears.humming(parts, 4, group_size, torch.bfloat16)
    for tokens in (WAVES_FROM + 1, 300, 1291, 5000, 9000):
        x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        made = with_gate(x)
        assert isinstance(made, linears.Gated)
        assert made.values.shape == (tokens, width)
        assert torch.equal(made.values, early_kernels.gate(plain(x)))
    assert choose_gated_tile(product, 5000) != choose_gated_tile(product, 304)
    few = torch.randn(WAVES_FROM, inputs, device="cuda", dtype=torch.bfloat16)
    assert with_gate(few).shape == (WAVES_FROM, 2 * width)
