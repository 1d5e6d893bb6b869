import numpy as np
import pytest
import torch

from stages.evaluation import cosine as cosine_module
from stages.evaluation.cosine import compare_tokens, flattened_cosine, grade
from stages.evaluation.cosine import token_cosines as cosine_of_tokens
from tests.helpers.embeddings import DIM, ORIGINAL, QUANTIZED, token_cosines


@pytest.mark.parametrize("kind", ["queries", "pages"])
def test_token_cosines_equal_a_loop(kind: str) -> None:
    before, after = getattr(ORIGINAL, kind), getattr(QUANTIZED, kind)
    expected = token_cosines(before, after)
    place = 0.01 * (len(expected) - 1)  # between the lowest two
    p01 = expected[0] + place * (expected[1] - expected[0])
    assert compare_tokens(before, after) == {
        "cosine": {
            "mean": pytest.approx(sum(expected) / len(expected), abs=1e-12),
            "p01": pytest.approx(p01, abs=1e-12),
            "min": pytest.approx(expected[0], abs=1e-12),
        },
        "nonfinite": 0,
        "nonfinite_original": 0,
    }


def test_flattened_cosine_counts_every_query_alike() -> None:
    # lengths differ, so that it is no mean of token cosines
    before = {"long": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "short": torch.tensor([[1.0, 0.0]])}
    after = {"long": torch.tensor([[3.0, 0.0], [1.0, 0.0]]), "short": torch.tensor([[0.0, 1.0]])}
    assert flattened_cosine(before, after) == pytest.approx((0.9 + 0) / 2)


@pytest.mark.parametrize(
    ("limit", "above", "below"),
    [(0.95, "EXCELLENT", "GOOD"), (0.90, "GOOD", "FAIR"), (0.85, "FAIR", "POOR")],
)
def test_grades_on_both_sides_of_each_limit(limit: float, above: str, below: str) -> None:
    assert grade(limit) == above
    assert grade(limit - 1e-8) == below
    assert (grade(1.0), grade(-1.0)) == ("EXCELLENT", "POOR")


def test_the_percentile_of_many_tokens_equals_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine_module, "PENDING", 10)
    drawn = np.random.default_rng(3)
    before = {
        f"p{i}": torch.tensor(drawn.normal(size=(37, DIM)), dtype=torch.float32) for i in range(30)
    }
    after = {
        name: tokens + 0.5 * torch.tensor(drawn.normal(size=(37, DIM)))
        for name, tokens in before.items()
    }
    expected = token_cosines(before, after)
    figures = compare_tokens(before, after)["cosine"]
    assert figures["p01"] == pytest.approx(np.percentile(expected, 1), abs=1e-12)
    assert figures["mean"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert figures["min"] == pytest.approx(expected[0], abs=1e-12)


def test_a_zero_vector_has_cosine_0() -> None:
    a, b = (
        {"q": torch.tensor([[0.0, 0.0], [1.0, 0.0]])},
        {"q": torch.tensor([[1.0, 0.0], [1.0, 0.0]])},
    )
    assert cosine_of_tokens(a["q"], b["q"]).tolist() == [0, 1]
    assert cosine_of_tokens(b["q"], a["q"]).tolist() == [0, 1]
