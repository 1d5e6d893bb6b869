"""Counted operations against torch's own counter on real forwards, and the 4B by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from colqwen3.model import ColQwen3
from colqwen3.model.loading import load_model, load_processor
from demo.benchmarks.operations import (
    page_operations,
    text_operations,
    tuning_operations,
    vision_operations,
)

DEMO = Path("demo/model")
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())


@pytest.fixture(scope="module")
def model() -> ColQwen3:
    loaded = load_model(DEMO, torch.float32, torch.device("cpu"))
    loaded.set_attn_implementation("eager")  # as plain products, which torch counts
    return loaded


def counted(model: ColQwen3, inputs: Any) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    total: int = counter.get_total_flops()
    return total


def test_a_query_as_torch_counts_it(model: ColQwen3) -> None:
    inputs = load_processor(DEMO, 1280).process_texts(["total of the year " * 30])
    tokens = inputs["input_ids"].shape[1]
    # torch counts all pairs of tokens, half of which the causal mask leaves out
    masked = 2 * tokens**2 * 4 * 64 * CONFIG["text_config"]["num_hidden_layers"]
    assert text_operations(CONFIG, tokens) + masked == pytest.approx(
        counted(model, inputs), rel=0.002
    )


def test_a_page_as_torch_counts_it(model: ColQwen3) -> None:
    inputs = load_processor(DEMO, 1280).process_images([Image.new("RGB", (512, 384), "white")])
    tokens = inputs["input_ids"].shape[1]
    masked = 2 * tokens**2 * 4 * 64 * CONFIG["text_config"]["num_hidden_layers"]
    assert page_operations(CONFIG, tokens, tokens - 11) + masked == pytest.approx(
        counted(model, inputs), rel=0.002
    )


def test_4b_by_hand(published_4b: dict[str, Any]) -> None:
    linears = 3_633_315_840 + 320 * 2560
    assert text_operations(published_4b, 100) == 200 * linears + 2 * 100**2 * 4096 * 36
    assert text_operations(published_4b, 1) - 2 * linears == 2 * 4096 * 36
    block = 3 * 1024 * 1024 + 1024 * 1024 + 2 * 4096 * 1024
    by_patch = 24 * block + 1024 * 3 * 2 * 16 * 16
    by_token = 4 * (4096 * 4096 + 2560 * 4096)
    assert vision_operations(published_4b, 400) == (
        2 * by_patch * 400 + 2 * by_token * 100 + 4 * 400**2 * 1024 * 24
    )
    assert page_operations(published_4b, 111, 100) == (
        text_operations(published_4b, 111) + vision_operations(published_4b, 400)
    )


def test_tuning_is_forwards_and_backwards_of_what_is_drawn(published_4b: dict[str, Any]) -> None:
    one = text_operations(published_4b, 50)
    assert tuning_operations(published_4b, [50] * 4, 0, 8) == 2 * 4 * one
    assert tuning_operations(published_4b, [50] * 4, 10, 8) == (2 * 4 + 3 * 10 * 4) * one
    assert tuning_operations(published_4b, [50] * 32, 200, 8) == (2 * 32 + 3 * 200 * 8) * one


def test_more_layers_take_more() -> None:
    deeper = copy.deepcopy(CONFIG)
    deeper["text_config"]["num_hidden_layers"] *= 2
    assert 1.9 < text_operations(deeper, 300) / text_operations(CONFIG, 300) < 2
