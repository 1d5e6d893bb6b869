"""Unfinished work is continued under the same recipe only."""

from pathlib import Path

import torch

from colqwen3.system.resume import work_key
from stages.quantization.allocation import Allocation
from stages.quantization.checkpoint import determinants
from stages.quantization.recipes import EndToEnd, GptqRecipe

PLAIN = GptqRecipe(method="gptq", calibration="some", bits=4, group_size=32, sym=True)


def key(tmp_path: Path, end_to_end: EndToEnd | None) -> str:
    recipe = PLAIN.model_copy(update={"end_to_end": end_to_end})
    cpu = torch.device("cpu")
    return work_key(determinants(recipe, Allocation({}), {"files": {}}, tmp_path, cpu))


def test_work_of_other_end_to_end_tuning_is_not_continued(tmp_path: Path) -> None:
    settings = [
        None, EndToEnd(steps=9), EndToEnd(steps=10), EndToEnd(steps=9, seed=1),
        EndToEnd(steps=9, codes_lr=0), EndToEnd(steps=9, scales_lr=0),
    ]  # fmt: skip
    keys = [key(tmp_path, setting) for setting in settings]
    assert len(set(keys)) == len(keys)
    assert keys == [key(tmp_path, setting) for setting in settings]
