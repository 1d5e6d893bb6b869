"""The projection of a released folder: right or an error, in whatever order a loader takes its tensors."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import colqwen3
from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.inspection import inspect_folder
from colqwen3.model import ColQwen3Config
from colqwen3.model.loading import load_model
from colqwen3.release.projection import released_config, write_released
from colqwen3.system.errors import UserError

SOURCE = Path("demo/model")
PREFIX = "embedding_proj_layer."
BIAS, GUARD, WEIGHT = (PREFIX + name for name in ("before_weight.bias", "guard_weight", "weight"))
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, original, laid out as a released folder."""
    target = tmp_path_factory.mktemp("laid-out")
    for path in SOURCE.glob("*.json"):
        if "index" not in path.name:
            shutil.copyfile(path, target / path.name)
    write_released(SOURCE, target)
    return target


@pytest.fixture(scope="module")
def projection(folder: Path) -> Tensors:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}


def load_as_vllm_does(
    tensors: Iterable[tuple[str, torch.Tensor]], hidden: int, width: int | None
) -> nn.Linear:
    """What vLLM 0.30 to 0.33 makes of tensors of the projection: the rule in few words.

    The first name with ``weight`` in it gives the width, unless the config does; there is a bias
    if any name says so, but never where the config gave the width; a tensor for which there is a
    parameter is copied into it, others are passed over.
    """
    listed = list(tensors)
    linear = None if width is None else nn.Linear(hidden, width, bias=False)
    for name, tensor in listed:
        if linear is None and "weight" in name:
            has_bias = any("bias" in other for other, _ in listed)
            linear = nn.Linear(hidden, len(tensor), bias=has_bias)
        parameter = getattr(linear, name.rpartition(".")[2], None)
        if parameter is not None:
            if parameter.shape != tensor.shape:
                raise AssertionError(f"{name}: shapes differ")
            parameter.data.copy_(tensor)
    assert linear is not None
    return linear


def is_right(linear: nn.Linear, projection: Tensors) -> bool:
    return (
        torch.equal(linear.weight, projection[WEIGHT].float())
        and linear.bias is not None
        and torch.equal(linear.bias, projection[BIAS].float())
    )


@pytest.fixture
def width(folder: Path) -> int | None:
    config = json.loads((folder / "config.json").read_text())
    names = ("embed_dim", "dims", "dim", "projection_dim", "colbert_dim")
    return next((config[name] for name in names if config.get(name)), None)


def test_names_and_places_in_the_file_have_one_order(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for names in (sorted(file.keys()), file.offset_keys()):
            assert [name for name in names if name.startswith(PREFIX)] == [BIAS, GUARD, WEIGHT]


def test_vllm_has_the_bias(projection: Tensors, width: int | None) -> None:
    assert width is None
    hidden = projection[WEIGHT].shape[1]
    assert is_right(load_as_vllm_does(sorted(projection.items()), hidden, width), projection)
    # what it does with the published layout: no bias, and a random one without embed_dim
    published = {WEIGHT: projection[WEIGHT], f"{PREFIX}bias": projection[BIAS]}
    items = sorted(published.items())
    assert load_as_vllm_does(items, hidden, len(projection[BIAS])).bias is None
    assert not is_right(load_as_vllm_does(items, hidden, width), projection)


def test_no_order_gives_vllm_a_random_bias(projection: Tensors, width: int | None) -> None:
    hidden = projection[WEIGHT].shape[1]
    right = 0
    for order in itertools.permutations(projection.items()):
        try:
            linear = load_as_vllm_does(order, hidden, width)
        except AssertionError:
            continue
        assert is_right(linear, projection)
        right += 1
    assert right == 4  # all but those in which the guard comes first


def test_vllm_fails_without_the_bias(projection: Tensors, width: int | None) -> None:
    rest = sorted((name, tensor) for name, tensor in projection.items() if name != BIAS)
    with pytest.raises(AssertionError, match="shapes differ"):
        load_as_vllm_does(rest, projection[WEIGHT].shape[1], width)


def test_original_and_laid_out_folder_are_the_same_model(folder: Path) -> None:
    published, released = Checkpoint.read(SOURCE), Checkpoint.read(folder)
    assert published.tensors.keys() == released.tensors.keys()
    cpu = torch.device("cpu")
    expected = load_model(SOURCE, torch.float32, cpu).state_dict()
    actual = load_model(folder, torch.float32, cpu).state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert inspect_folder(folder)[1]["total"] == inspect_folder(SOURCE)[1]["total"]


def change(folder: Path, target: Path, edit: Callable[[Tensors], object]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


LOADERS: list[Callable[[Path], object]] = [
    lambda folder: load_model(folder, torch.float32, torch.device("cpu")),
    lambda folder: colqwen3.load_runtime(folder, "cpu", mode="eager"),
    inspect_folder,
]


@pytest.mark.parametrize("load", LOADERS, ids=["load_model", "load_runtime", "inspect_folder"])
@pytest.mark.parametrize("kind", ["removed", "twice", "not finite"])
def test_our_loaders_reject_a_projection_that_is_not_whole(
    folder: Path, tmp_path: Path, kind: str, load: Callable[[Path], object]
) -> None:
    if kind == "not finite" and load is inspect_folder:
        pytest.skip("reads no weights")
    edits: dict[str, Callable[[Tensors], object]] = {
        "removed": lambda tensors: tensors.pop(BIAS),
        "twice": lambda tensors: tensors.update({f"{PREFIX}bias": tensors[BIAS] + 1}),
        "not finite": lambda tensors: tensors[BIAS].fill_(torch.nan),
    }
    with pytest.raises(UserError, match=r"embedding_proj_layer\.(before_weight\.)?bias"):
        load(change(folder, tmp_path / "changed", edits[kind]))


def test_a_source_without_bias_is_not_laid_out(folder: Path, tmp_path: Path) -> None:
    broken = change(folder, tmp_path / "broken", lambda tensors: tensors.pop(BIAS))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"lacks embedding_proj_layer\.bias"):
        write_released(broken, tmp_path / "out")
    mixed = change(
        folder, tmp_path / "mixed", lambda tensors: tensors.update({BIAS: tensors[BIAS].float()})
    )
    with pytest.raises(UserError, match="differ in dtype"):
        write_released(mixed, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_width_is_read_from_either_key_and_must_agree(published_4b: dict[str, object]) -> None:
    config = released_config(published_4b)
    assert "embed_dim" not in config
    assert config["vector_dim"] == 320
    assert released_config(config) == config
    with pytest.raises(ValueError, match="embed_dim and vector_dim differ"):
        released_config({**config, "embed_dim": 128})
    assert ColQwen3Config(vector_dim=128).embed_dim == 128
    assert ColQwen3Config(embed_dim=128, vector_dim=128).embed_dim == 128
    assert ColQwen3Config().embed_dim == 320
    with pytest.raises(ValueError, match="differ"):
        ColQwen3Config(embed_dim=320, vector_dim=128)
