"""What whole-model steps need, by hand, and what is said where there is less."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from stages.quantization import memory
from stages.quantization.memory import (
    Sizes,
    TooLittleMemoryError,
    check_memory,
    longest_step,
    memory_needed,
)
from stages.quantization.recipes import AnyRecipe, EndToEnd, Recipe

CPU = torch.device("cpu")
SIZES = Sizes(
    layers=[[(3, 2), (5, 3)], [(4, 2)]],  # 29 weights; matrices over outputs of 9, 25 and 16
    hidden=2,
    deepstack=1,
    tokens=[10, 20, 30, 40],
    kinds=["page", "page", "query", "query"],
)
A_TOKEN = 4 * (2 * (3 + 1) + 8)
"""Three states and one deepstack feature of 2 numbers, and 8 outputs of the wider layer."""
TUNED_ON = (20 + 40) * A_TOKEN  # the first page and the first query are held back
WEIGHED = 4 * 29 + 4 * (9 + 25 + 16)
GPTQ = {"method": "gptq", "calibration": "mine", "bits": 4, "group_size": 128, "sym": True}
STEPS = {"steps": 2}


def recipe(**values: Any) -> AnyRecipe:
    made: AnyRecipe = TypeAdapter(Recipe).validate_python({**GPTQ, **values})
    return made


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"method": "rtn", "calibration": "none"}, {}),
        ({"end_to_end": STEPS}, {"end_to_end": 13 * 29 + TUNED_ON}),
        ({"end_to_end": {**STEPS, "codes_lr": 0}}, {"end_to_end": 29 + TUNED_ON}),
        ({"hessian": "model"}, {"hessian": WEIGHED + 40 * A_TOKEN}),
        # in two packs, of the first and the third sample and of the others
        ({"hessian": "model", "batch_size": 2}, {"hessian": WEIGHED + (20 + 40) * A_TOKEN}),
        (
            {"hessian": "model", "batch_size": 4, "end_to_end": STEPS},
            {"hessian": WEIGHED + 100 * A_TOKEN, "end_to_end": 13 * 29 + TUNED_ON},
        ),
    ],
)
def test_needs_by_hand(values: dict[str, Any], expected: dict[str, int]) -> None:
    assert memory_needed(recipe(**values), SIZES) == expected


def test_the_longest_step_counts() -> None:
    """Of eight passages that are not held back, four steps take two each; one is the longest."""
    tokens = [1000, 1, 1, 100, 1, 1, 1, 1, 1000, 1]
    assert longest_step(tokens, 10 * ["passage"], EndToEnd(steps=4)) == 101


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"end_to_end": STEPS}, 13 * 29 + TUNED_ON),
        ({"hessian": "model"}, WEIGHED + 40 * A_TOKEN),
    ],
)
def test_one_byte_too_few_is_told(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], needed: int
) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: needed)
    check_memory("mine", recipe(**values), SIZES, CPU)
    monkeypatch.setattr(memory, "memory_of", lambda device: needed - 1)
    (key,) = values
    check_memory("mine", recipe(**values), SIZES, CPU, done={memory.DONE[key]})  # is behind it
    with pytest.raises(
        TooLittleMemoryError, match=rf"^params\.yaml: recipes\.mine\.{key} needs more"
    ):
        check_memory("mine", recipe(**values), SIZES, CPU)
