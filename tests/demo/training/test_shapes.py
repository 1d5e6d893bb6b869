"""The shapes that the demonstration retriever can be trained in."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from demo.training.network import Retriever, Shape, initialise, published_config
from demo.training.shapes import SIZES, Size, count_parameters, named_size
from demo.training.train import PRESETS, fit, rate

NAMES = list(SIZES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file("demo/model/tokenizer.json")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_model(name: str, tokenizer: Tokenizer) -> None:
    with torch.device("meta"):
        model = Retriever(published_config(SIZES[name].shape, tokenizer), tokenizer)
    parts = {
        "vision": model.vlm.model.visual,
        "text": model.vlm.model.language_model,
        "projection": model.embedding_proj_layer,
    }
    counts = {
        part: sum(weight.numel() for weight in module.parameters())
        for part, module in parts.items()
    }
    assert count_parameters(SIZES[name].shape) == counts
    assert sum(counts.values()) == sum(weight.numel() for weight in model.parameters())


def test_sizes_span_from_about_one_to_150_million_parameters() -> None:
    totals = {name: sum(count_parameters(size.shape).values()) for name, size in SIZES.items()}
    assert 1_000_000 <= totals["1m"] < 2_000_000
    assert 39_000_000 <= totals["39m"] < 41_000_000
    assert totals["150m"] >= 150_000_000
    assert list(totals.values()) == sorted(totals.values())


def test_the_default_is_the_committed_model() -> None:
    log = json.loads(Path("metrics/demo_training.json").read_text("utf-8"))
    assert SIZES["demo"].shape == Shape()
    assert count_parameters(Shape()) == log["parameters"]
    preset = fit(PRESETS["cuda"], SIZES["demo"])
    assert preset == PRESETS["cuda"]
    assert (preset.stages[0].patches, preset.rate) == (49152, 1.5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_valid(name: str) -> None:
    shape = SIZES[name].shape
    assert list(shape.deepstack) == sorted(set(shape.deepstack))
    assert all(0 <= index < shape.vision_depth for index in shape.deepstack)
    assert len(shape.deepstack) <= shape.layers  # one layer takes each
    assert shape.heads % shape.kv_heads == 0
    assert shape.vision_hidden % (4 * shape.vision_heads) == 0  # rotary by two axes
    assert (shape.vocab, shape.embed_dim, shape.head_dim) == (2048, 128, 64)
    group = 64 if name == "micro" else 128
    assert shape.hidden % group == shape.intermediate % group == 0
    assert shape.heads * shape.head_dim % group == 0


def test_the_largest_is_deep_and_has_three_injections() -> None:
    shape = SIZES["150m"].shape
    assert shape.layers >= 12
    assert len(shape.deepstack) == 3
    assert shape.vision_hidden > SIZES["39m"].shape.vision_hidden


def test_learning_rate_warms_up_where_a_size_says() -> None:
    warm_ups = SIZES["150m"].warm_ups
    assert rate(0.0, warm_ups) == pytest.approx(0.02)
    assert rate(0.12, warm_ups) == 1.0
    assert rate(0.13, warm_ups) == pytest.approx(0.02)
    assert rate(0.15, warm_ups) == pytest.approx(0.52)
    assert rate(0.2, warm_ups) == 1.0
    for done in (0.0, 0.01, 0.02, 0.3, 0.7, 0.99):
        assert rate(done) == min(1.0, done / 0.02 + 0.02, math.pow((1.0 - done) / 0.42, 1.5) + 0.01)


def test_a_size_has_a_name_or_is_a_file(tmp_path: Path) -> None:
    assert named_size("39m") == ("39m", SIZES["39m"], "39m")
    path = tmp_path / "other.json"
    values = {
        "hidden": 384, "layers": 6, "heads": 6, "kv_heads": 3, "intermediate": 1024,
        "vision_hidden": 192, "vision_depth": 5, "vision_heads": 6, "deepstack": [0, 2, 4],
        "embed_dim": 320, "rate": 0.7, "warm_ups": [[0, 0.03], [0.13, 0.04]],
    }  # fmt: skip
    path.write_text(json.dumps(values))
    shape = Shape(2048, 384, 6, 6, 3, 64, 1024, 192, 5, 6, (0, 2, 4), 320)
    size = Size(shape, rate=0.7, warm_ups=((0, 0.03), (0.13, 0.04)))
    assert named_size(str(path)) == ("other", size, str(path))
    path.write_text("{}")
    assert named_size(str(path)).size == SIZES["demo"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "is no JSON object"),
        ("{", "is no JSON file"),
        ('{"width": 3}', "width is none of hidden, layers,"),
        ('{"vocab": 3}', "vocab is none of"),
        ('{"layers": 2.5}', "layers is 2.5; give a whole number from 1"),
        ('{"rate": 0}', "rate is 0; give a number above 0"),
        ('{"heads": 4, "kv_heads": 3}', "heads is 4, which kv_heads = 3 does not divide"),
        ('{"vision_hidden": 72}', "vision_hidden is 72, which 4 x vision_heads = 16 does not divide"),
        ('{"hidden": 100}', "hidden is 100; give a multiple of 32"),
        ('{"deepstack": [3, 1]}', "give rising numbers from 0 to vision_depth - 1"),
        ('{"deepstack": "ab"}', "give a list of vision blocks"),
        ('{"layers": 1}', "deepstack has 2 blocks for 1 layers"),
        ('{"warm_ups": [0.1]}', "give pairs of fractions"),
    ],
)  # fmt: skip
def test_a_file_of_sizes_that_is_wrong_is_named(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        named_size(str(path))
    assert str(raised.value).startswith(f"{path}: ") and told in str(raised.value)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"^40m: give one of micro, 1m, demo, 39m"):
        named_size("40m")


def test_filters_beyond_the_number_of_pixels_can_be_started_from(tokenizer: Tokenizer) -> None:
    shape = Shape(vision_hidden=320, vision_depth=1, layers=1, deepstack=(0,))
    model = Retriever(published_config(shape, tokenizer), tokenizer)
    initialise(model, tokenizer, torch.randn(320, 256), 1)
    cells, deep, _ = model.vision(torch.zeros(1, 64, 64))
    assert cells.isfinite().all() and len(deep) == 1
