"""What whole-model steps need, by hand, and what is said where there is less."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from stages.quantization import memory
from stages.quantization.memory import TooLittleMemoryError, check_memory, memory_needed
from stages.quantization.recipes import AnyRecipe, Recipe

CPU = torch.device("cpu")
SHAPES = [(3, 2), (5, 3)]  # 21 weights; matrices over outputs of 9 and 25
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
        ({"end_to_end": STEPS}, {"end_to_end": 13 * 21}),
        ({"end_to_end": {**STEPS, "codes_lr": 0}}, {"end_to_end": 21}),
        ({"hessian": "model"}, {"hessian": 4 * 21 + 4 * (9 + 25)}),
        (
            {"hessian": "model", "end_to_end": STEPS},
            {"hessian": 4 * 21 + 4 * (9 + 25), "end_to_end": 13 * 21},
        ),
    ],
)
def test_needs_by_hand(values: dict[str, Any], expected: dict[str, int]) -> None:
    assert memory_needed(recipe(**values), SHAPES) == expected


@pytest.mark.parametrize(
    ("values", "needed"),
    [({"end_to_end": STEPS}, 13 * 21), ({"hessian": "model"}, 4 * 21 + 4 * 34)],
)
def test_one_byte_too_few_is_told(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], needed: int
) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: needed)
    check_memory("mine", recipe(**values), SHAPES, CPU)
    monkeypatch.setattr(memory, "memory_of", lambda device: needed - 1)
    (key,) = values
    check_memory("mine", recipe(**values), SHAPES, CPU, done={memory.DONE[key]})  # is behind it
    with pytest.raises(
        TooLittleMemoryError, match=rf"^params\.yaml: recipes\.mine\.{key} needs more"
    ):
        check_memory("mine", recipe(**values), SHAPES, CPU)
