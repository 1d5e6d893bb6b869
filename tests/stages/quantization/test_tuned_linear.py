"""A tuned linear computes with what it will store, and its gradients are those of rounding's slope 1."""

import torch

from colqwen3.checkpoint.packing import dense_weight, dequantize, pack
from stages.quantization.tuned_linear import TunedLinear

BITS = 3
CODES = torch.tensor([[-4, 3, 0, 1], [2, -1, 3, -4]], dtype=torch.int8)
SCALES = torch.tensor([[0.5, -0.25], [0.125, 1.0]]).half()
DENSE = torch.tensor([[-2.0, 1.5, 0.0, -0.25], [0.25, -0.125, 3.0, -4.0]])
TOKENS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 2.0, 1.0]])


def linear(weight: torch.Tensor | None = None) -> TunedLinear:
    return TunedLinear(CODES, SCALES, BITS, weight)


def test_at_the_start_it_computes_with_the_given_codes_and_scales() -> None:
    far_away = DENSE + 10  # the original may be anywhere: the codes stay what they are
    for module in (linear(), linear(DENSE), linear(far_away)):
        assert torch.equal(module(TOKENS), TOKENS @ DENSE.T)


def test_gradients_are_those_of_the_dense_weight() -> None:
    module, dense = linear(DENSE), DENSE.clone().requires_grad_()
    pull = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    (module(TOKENS) * pull).sum().backward()
    (torch.nn.functional.linear(TOKENS, dense) * pull).sum().backward()  # type: ignore[no-untyped-call]
    assert dense.grad is not None
    assert module.change.grad is not None and module.offset.grad is not None
    # d weight / d change is the weight itself, d weight / d offset the scale
    by_group = (dense.grad * DENSE).view(2, 2, 2).sum(-1)
    assert torch.allclose(module.change.grad, by_group)
    by_code = (dense.grad.view(2, 2, 2) * SCALES.float().unsqueeze(-1)).flatten(1)
    assert torch.allclose(module.offset.grad, by_code)


def test_a_code_beyond_its_range_gets_no_gradient() -> None:
    module = linear(DENSE)
    with torch.no_grad():
        module.offset[0, :2] = torch.tensor([-0.6, 0.6])  # of codes -4 and 3, the ends of the range
    module(TOKENS).sum().backward()
    assert module.offset.grad is not None
    assert (module.offset.grad == 0).nonzero().tolist() == [[0, 0], [0, 1]]
    assert torch.equal(module(TOKENS), TOKENS @ DENSE.T)


def test_what_it_stores_is_what_it_computed_with() -> None:
    module = linear(DENSE)
    with torch.no_grad():
        module.offset[0, 2], module.offset[1, 0] = 0.7, -1.2
        module.change.copy_(torch.tensor([[0.1, -0.03], [0.3333, 0.0001]]))
    moved = CODES.clone()
    moved[0, 2], moved[1, 0] = 1, 1
    scales = (SCALES.float() * (1 + module.change.detach())).half()
    expected = dense_weight(moved, scales)
    assert torch.equal(module(TOKENS), TOKENS @ expected.T)


def test_packed_tensors_hold_the_tuned_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-4, 4, (32, 64), generator=generator, dtype=torch.int8)
    scales = (torch.rand(32, 2, generator=generator) + 0.5).half()
    module = TunedLinear(codes, scales, BITS, dense_weight(codes, scales))
    expected = pack(codes, scales, BITS)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.packed().items())
    with torch.no_grad():
        module.offset.add_(torch.randn(32, 64, generator=generator))
        module.change.copy_(0.01 * torch.randn(32, 2, generator=generator))
    tokens = torch.eye(64)
    assert torch.equal(module(tokens).T, dequantize(**module.packed(), bits=BITS))


def test_without_the_original_only_scales_are_tuned() -> None:
    module = linear()
    module(TOKENS).sum().backward()
    assert module.change.grad is not None
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["change"]


def test_a_bias_is_added_and_stays() -> None:
    bias = torch.tensor([1.0, -2.0])
    module = TunedLinear(CODES, SCALES, BITS, DENSE, bias)
    assert torch.equal(module(TOKENS), TOKENS @ DENSE.T + bias)
    assert {name for name, _ in module.named_parameters()} == {"change", "offset"}
