"""With token embeddings and vision tower quantized, layers are tuned on what the finished model has.

The finished model is the original given the weights of the checkpoint, read by hand, and run by
transformers.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.headers import SINGLE, Checkpoint
from colqwen3.checkpoint.layout import BLOCKS, VISION, tensors
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.files import read_json
from colqwen3.system.resume import Scratch
from stages.quantization import tuning, vision
from stages.quantization.activations import Sample
from stages.quantization.allocation import Allocation, uniform
from stages.quantization.checkpoint import check_checkpoint, make_checkpoint
from stages.quantization.linears import Filled, Job
from stages.quantization.recipes import AutoRoundRecipe, GptqRecipe, TunedRecipe
from stages.quantization.sample_packs import pack_samples
from tests.helpers.by_hand import dense_weights

DEMO, CPU = Path("demo/model"), torch.device("cpu")
COARSE: dict[str, Any] = {
    "calibration": "some", "bits": 4, "group_size": 128, "sym": True, "token_embeddings": 4,
    "vision": {"attention": 4, "mergers": 4},
}  # fmt: skip
TUNED = AutoRoundRecipe(method="autoround", iters=2, lr=0.01, seed=1, **COARSE)
RECIPES: dict[str, TunedRecipe] = {
    "gptq": GptqRecipe(method="gptq", **COARSE),
    "autoround": TUNED,
    "packed": TUNED.model_copy(update={"batch_size": 2, "gradient_accumulate_steps": 1}),
    "naive": TUNED.model_copy(update={"deepstack": False}),
}
LAYERS = [f"{BLOCKS}.{index}" for index in range(3)]
TOWER = [
    f"{VISION}.{part}"
    for part in (
        "blocks.0", "deepstack_merger_list.0", "blocks.1", "deepstack_merger_list.1", "merger",
    )
]  # fmt: skip
"""Parts of the vision tower in the order in which they run."""
Inputs = list[list[torch.Tensor]]
"""Hidden states by layer and sample."""


@dataclass
class Made:
    """A checkpoint, and what its layers were tuned on.

    Attributes
    ----------
    full, quantized
        Inputs of decoder layers, in the full-precision model and in the quantized one.
    tower_full, tower_quantized
        The same of the parts of the vision tower; the first is given what it has in both.
    """

    folder: Path
    filled: Filled
    full: Inputs
    quantized: Inputs
    tower_full: Inputs
    tower_quantized: Inputs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model without all but three decoder layers and two blocks of its vision tower."""
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = len(LAYERS)
    config["vision_config"].update(depth=2, deepstack_visual_indexes=[0, 1])
    (folder / "config.json").write_text(json.dumps(config))
    stored = {k: v for path in DEMO.glob("*.safetensors") for k, v in load_file(path).items()}
    save_file({name: stored[name] for name in tensors(config)}, folder / SINGLE)
    return folder


@cache
def samples() -> list[Sample]:
    processor = load_processor(DEMO, 64)
    image = Image.linear_gradient("L")
    return [
        dict(processor.process_images([image.resize((160, 128))])),
        dict(processor.process_texts(["total of the year"])),
        dict(processor.process_images([image.rotate(90).resize((96, 160))])),
    ]


def allocation(source: Path, recipe: TunedRecipe) -> Allocation:
    """Return that of a recipe, but for linears of two decoder layers in other widths."""
    usual = uniform("r", recipe, read_json(source / "config.json", ""))
    own = {f"{LAYERS[1]}.self_attn.{part}_proj": 3 for part in "qkv"}
    own |= {f"{LAYERS[2]}.self_attn.{part}_proj": 8 for part in "qkv"}
    own[f"{LAYERS[1]}.mlp.down_proj"] = 8
    return Allocation({**usual.linears, **own}, usual.token_embeddings)


def job(source: Path, recipe: TunedRecipe, scratch: Scratch) -> Job:
    checkpoint = Checkpoint.read(source)
    return Job(checkpoint, allocation(source, recipe), recipe, samples(), CPU, scratch)


def make(source: Path, recipe: TunedRecipe, folder: Path) -> Made:
    real, seen = tuning.tune_layer, [list[Any](), list[Any](), list[Any](), list[Any]()]

    def watch(full: list[Any], quantized: list[Any]) -> Any:
        def tune(layer: Any, inputs: Any, hidden: Any, given: Any, *rest: Any) -> Any:
            full.append([state.clone() for state in hidden])
            quantized.append([state.clone() for state in (hidden if given is None else given)])
            return real(layer, inputs, hidden, given, *rest)

        return tune

    with pytest.MonkeyPatch.context() as patch, Scratch(folder, "key") as scratch:
        patch.setattr(tuning, "tune_layer", watch(*seen[:2]))
        patch.setattr(vision, "tune_layer", watch(*seen[2:]))
        work = job(source, recipe, scratch)
        made, filled = make_checkpoint(work)
        check_checkpoint(made, work)
    return Made(made, filled, *seen)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Return what makes a checkpoint by a recipe, once."""
    return cache(lambda name: make(source, RECIPES[name], tmp_path_factory.mktemp(name)))


@torch.inference_mode()
def inputs_of(model: Any, names: list[str]) -> Inputs:
    """Return what modules of a model are given, sample by sample."""
    seen: Inputs = [[] for _ in names]
    for states, name in zip(seen, names, strict=True):

        def record(_: Any, args: Any, kwargs: Any, states: list[torch.Tensor] = states) -> None:
            states.append((args or (kwargs["hidden_states"],))[0].clone())

        model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)
    for sample in samples():
        model(**sample)
    return seen


def original(source: Path) -> Any:
    return load_model(source, torch.float32, CPU)


def finished(source: Path, result: Made, name: str) -> Any:
    """Return the original model with the weights of a checkpoint, read by hand."""
    model, bits = original(source), allocation(source, RECIPES[name]).modules
    weights = dense_weights(load_file(result.folder / SINGLE), bits)
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def gaps(found: Inputs, expected: Inputs, size: int = 1) -> list[float]:
    """Return the largest difference of each layer's inputs, relative to the largest input."""
    result = []
    for states, wanted in zip(found, expected, strict=True):
        if size > 1:
            packs = pack_samples([{"hidden_states": state} for state in wanted], size)
            wanted = [pack["hidden_states"] for pack in packs]
        pairs = zip(states, wanted, strict=True)
        differences = [float((a.view(b.shape) - b).abs().max() / b.abs().max()) for a, b in pairs]
        result.append(max(differences))
    return result


@pytest.mark.parametrize("name", ["gptq", "autoround", "packed"])
def test_layers_are_tuned_on_the_inputs_that_they_have_in_the_finished_model(
    source: Path, made: Callable[[str], Made], name: str
) -> None:
    result, size = made(name), RECIPES[name].batch_size
    assert result.filled.weight_errors.keys() == allocation(source, RECIPES[name]).modules.keys()
    before = inputs_of(original(source), LAYERS)
    after = inputs_of(finished(source, result, name), LAYERS)
    assert max(gaps(result.full, before, size)) < 1e-5
    assert max(gaps(result.quantized, after, size)) < 1e-5
    assert min(gaps(result.quantized, before, size)) > 1e-2  # the front does change them


@pytest.mark.parametrize("name", ["gptq", "autoround"])
def test_so_are_the_parts_of_the_vision_tower(
    source: Path, made: Callable[[str], Made], name: str
) -> None:
    result = made(name)
    before, after = (
        inputs_of(model, TOWER) for model in (original(source), finished(source, result, name))
    )
    assert max(gaps(result.tower_full, before)) < 1e-5
    assert max(gaps(result.tower_quantized, after)) < 1e-5
    assert min(gaps(result.tower_quantized, before)[1:]) > 1e-3


def test_without_the_shifts_of_deepstack_the_inputs_are_other_ones(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "add_shifts", lambda quantized, *_: quantized)
    result = make(source, TUNED, tmp_path)
    after = inputs_of(finished(source, result, "autoround"), LAYERS)
    first, *others = gaps(result.quantized, after)
    assert first < 1e-5
    assert min(others) > 1e-3  # features are added behind the first two layers


def test_without_deepstack_the_first_layer_is_given_the_quantized_front_too(
    source: Path, made: Callable[[str], Made]
) -> None:
    result = made("naive")
    after = inputs_of(finished(source, result, "naive"), LAYERS)
    first, *others = gaps(result.quantized, after)
    assert first < 1e-5
    assert min(others) > 1e-3


@pytest.mark.parametrize(("module", "after"), [(vision, 3), (tuning, 2)])
def test_a_run_that_was_killed_goes_on_and_gives_equal_bytes(
    source: Path,
    made: Callable[[str], Made],
    module: Any,
    after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calm, real, calls = made("autoround"), tuning.tune_layer, 0

    def fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, Scratch(tmp_path, "key") as scratch:
        patch.setattr(module, "tune_layer", fails)
        with pytest.raises(KeyboardInterrupt):
            make_checkpoint(job(source, TUNED, scratch))
    resumed = make(source, TUNED, tmp_path)
    # what was finished is not tuned again; the tower is finished as a whole
    in_tower = module is vision
    assert len(resumed.full) == len(LAYERS) - (0 if in_tower else after)
    assert len(resumed.tower_full) == (len(TOWER) if in_tower else 0)
    for name in (SINGLE, "config.json"):
        assert (resumed.folder / name).read_bytes() == (calm.folder / name).read_bytes()
    assert resumed.filled == calm.filled
