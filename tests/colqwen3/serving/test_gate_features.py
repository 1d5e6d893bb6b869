"""The order in which features of a gate lie."""

import pytest
import torch

from colqwen3.serving import fused, gate_features


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (16, [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]),
        (3, [0, 3, 1, 4, 2, 5]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (6, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]),
    ],
)
def test_features_of_a_gate_alternate(width: int, expected: list[int]) -> None:
    order = gate_features.alternating(width)
    assert order.tolist() == expected
    in_a_row = torch.randn(3, 2 * width)
    assert torch.equal(gate_features.alternate(in_a_row), in_a_row[:, order])
    first, second = in_a_row.chunk(2, -1)
    actual = fused.gate(in_a_row[:, order])
    torch.testing.assert_close(actual, torch.nn.functional.silu(first) * second)
