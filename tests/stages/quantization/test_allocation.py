"""Bits of each module by recipe, counted by hand, and the tensors and bytes that follow from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from colqwen3.checkpoint.headers import DTYPE_BYTES, Checkpoint
from colqwen3.checkpoint.layout import BLOCKS, EMBEDDINGS
from colqwen3.inspection import inspect_folder
from colqwen3.system.errors import UserError
from stages.quantization.allocation import (
    Allocation,
    bytes_of,
    describe,
    describe_bits,
    planned_tensors,
    read_allocation,
    shapes_of,
    uniform,
)
from stages.quantization.recipes import RtnRecipe
from tests.helpers.metrics import write_json
from tests.helpers.refusal import refusal
from tests.helpers.rounded import allocated

DEMO = Path("demo/model")
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())
SOURCE = Checkpoint.read(DEMO)


def recipe(**values: Any) -> RtnRecipe:
    weights = {"bits": 4, "group_size": 32, "sym": True, **values}
    return RtnRecipe.model_validate({"method": "rtn", "calibration": "none", **weights})


def test_without_more_words_only_the_language_model_is_quantized() -> None:
    allocation = uniform("r", recipe(bits=3), CONFIG)
    assert len(allocation.linears) == 4 * 7
    assert set(allocation.linears.values()) == {3}
    assert all(name.startswith(f"{BLOCKS}.") for name in allocation.linears)
    assert allocation.text == list(allocation.linears)
    assert (allocation.vision, allocation.token_embeddings) == ([], 16)
    assert allocation.modules == allocation.linears


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = [f"{BLOCKS}.{index}.mlp.{part}" for index in (10, 2, 0) for part in ("up", "down")]
    allocation = Allocation(dict.fromkeys(["vlm.model.visual.merger.linear_fc1", *names], 4))
    assert allocation.text == names
    assert allocation.layers == [names[4:], names[2:4], names[:2]]


PARTS: list[tuple[Any, dict[str, dict[str, int]]]] = [
    (16, {}),
    ({"attention": 16}, {}),
    ({"attention": 8}, {"vision_attention": {"8": 12}}),
    (
        {"mlp": 4, "mergers": 8},  # a merger behind the tower and two of deepstack
        {"vision_mlp": {"4": 12}, "vision_mergers": {"8": 6}},
    ),
    (
        8,
        {"vision_attention": {"8": 12}, "vision_mlp": {"8": 12}, "vision_mergers": {"8": 6}},
    ),
]


@pytest.mark.parametrize(("vision", "counts"), PARTS)
def test_parts_of_the_vision_tower_are_chosen_one_by_one(vision: Any, counts: Any) -> None:
    allocation = uniform("r", recipe(vision=vision), CONFIG)
    assert describe_bits(allocation) == {"language_model": {"4": 28}, **counts}
    assert len(allocation.vision) == sum(n for part in counts.values() for n in part.values())
    assert list(allocation.linears)[:28] == list(uniform("r", recipe(), CONFIG).linears)


def test_shapes_are_outputs_and_inputs() -> None:
    shapes = shapes_of(uniform("r", recipe(token_embeddings=4, vision=8), CONFIG), CONFIG)
    assert shapes[EMBEDDINGS] == (2048, 256)
    assert shapes["vlm.model.visual.merger.linear_fc1"] == (512, 512)
    assert shapes["vlm.model.visual.blocks.5.attn.qkv"] == (384, 128)
    for name, shape in shapes.items():
        assert SOURCE.tensors[f"{name}.weight"].shape == shape


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"token_embeddings": 8}, "192 inputs of vlm.model.language_model.embed_tokens"),
        ({"vision": {"mlp": 8}}, "96 inputs of vlm.model.visual.blocks.0.mlp.linear_fc1"),
        ({"vision": {"attention": 4}}, "96 inputs of vlm.model.visual.blocks.0.attn.qkv"),
    ],
)
def test_the_group_size_must_divide_the_inputs_of_what_is_quantized(
    values: dict[str, Any], said: str
) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["vision_config"]["hidden_size"] = 96
    wide = recipe(group_size=64)
    assert uniform("r", wide, config)
    if "token_embeddings" in values:
        config["text_config"]["hidden_size"] = 192
        with pytest.raises(UserError, match=r"recipes\.r\.group_size is 128"):
            uniform("r", wide.model_copy(update={"group_size": 128}), config)
        return
    with pytest.raises(UserError, match=rf"recipes\.r\.group_size is 64.* {said}"):
        uniform("r", recipe(group_size=64, **values), config)


MADE = [
    {"bits": 4, "group_size": 32, "token_embeddings": 8, "vision": 8},
    {"bits": 3, "group_size": 128, "token_embeddings": 4, "vision": {"mlp": 4, "mergers": 8}},
    {"bits": 2, "group_size": 64, "vision": {"attention": 4}},
    {"bits": 8, "group_size": 128, "token_embeddings": 8},
]


@pytest.mark.parametrize("values", MADE)
def test_planned_tensors_and_bytes_are_those_of_a_checkpoint(
    values: dict[str, Any], tmp_path: Path
) -> None:
    made = recipe(**values)
    allocation = uniform("r", made, CONFIG)
    allocated(DEMO, tmp_path, allocation, made)
    tensors = load_file(tmp_path / "model.safetensors")
    planned = planned_tensors(SOURCE.tensors, allocation, made.group_size)
    assert {name: shape for name, (_, shape) in planned.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    for name, (dtype, _) in planned.items():
        assert DTYPE_BYTES[dtype] == tensors[name].element_size()
    real = sum(tensor.nbytes for tensor in tensors.values())
    assert bytes_of(planned.values()) == describe(allocation, planned)["bytes"] == real

    # and `inspect` has said so beforehand, part by part
    metrics = inspect_folder(DEMO)[1]
    savings = metrics["expected_savings"][f"g{made.group_size}"]
    chosen = {f"vision_{part}": bits for part, bits in made.vision_bits.items()}
    chosen["token_embeddings"] = allocation.token_embeddings
    saved = sum(savings[part][str(bits)] for part, bits in chosen.items() if bits < 16)
    assert metrics["expected_bytes"][f"w{made.bits}g{made.group_size}"] - saved == real


def test_savings_are_given_for_what_the_group_size_divides() -> None:
    golden = inspect_folder(Path("tests/golden/model"))[1]["expected_savings"]
    # its vision tower is 36 and 72 wide; the mergers read 144
    assert {size: list(parts) for size, parts in golden.items()} == {
        f"g{size}": ["token_embeddings"] for size in (32, 64, 128)
    }
    rows, width = 448, 128
    assert golden["g64"]["token_embeddings"] == {
        "8": rows * (2 * width - width - 2 * 2), "4": rows * (2 * width - width // 2 - 2 * 2)
    }  # fmt: skip


def test_an_allocation_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    allocation = uniform("r", recipe(token_embeddings=4, vision={"mlp": 8}), CONFIG)
    planned = planned_tensors(SOURCE.tensors, allocation, 32)
    write_json(path, describe(allocation, planned))
    assert read_allocation(path) == allocation


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"linears": {"a": 4}},
        {"linears": 3, "token_embeddings": 16},
        {"linears": {}, "token_embeddings": None},
        [],
        None,
    ],
)
def test_a_damaged_allocation_is_one_line(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.json"
    write_json(path, value)
    assert refusal(read_allocation, path) == f"{path}: is damaged; run `dvc repro -f allocate`"
    path.unlink()
    assert "run `dvc repro -f allocate`" in refusal(read_allocation, path)


def test_the_front_is_what_is_quantized_outside_the_decoder_layers() -> None:
    tower = {"vlm.model.visual.merger.linear_fc1": 8}
    inside = {f"{BLOCKS}.{index}.mlp.up_proj": 4 for index in (1, 10)}
    assert Allocation({**inside, **tower}, 4).front == {**tower, EMBEDDINGS: 4}
    assert Allocation({**inside, **tower}).front == tower
    assert Allocation(inside, 8).front == {EMBEDDINGS: 8}
    assert Allocation(inside).front == {}


def test_modules_are_the_linears_and_the_table() -> None:
    assert Allocation({"a": 4}, 8).modules == {"a": 4, EMBEDDINGS: 8}
    assert Allocation({"a": 4}).modules == {"a": 4}
