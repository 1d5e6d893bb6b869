"""Deepstack folded into the layers: same output, and AutoRound tunes on the true layer inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import BLOCKS
from colqwen3.inspection import inspect_folder
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.resume import Scratch
from stages.quantization import layers
from stages.quantization.activations import Sample
from stages.quantization.allocation import uniform
from stages.quantization.checkpoint import make_checkpoint
from stages.quantization.deepstack import fold_deepstack
from stages.quantization.linears import Job
from stages.quantization.recipes import AutoRoundRecipe

GOLDEN = Path("tests/golden/model")
CPU = torch.device("cpu")
RECIPE = AutoRoundRecipe(
    method="autoround",
    calibration="any",
    bits=4,
    group_size=128,
    sym=True,
    iters=1,
    lr=0.01,
    seed=1,
)


def recipe(deepstack: bool) -> AutoRoundRecipe:
    return AutoRoundRecipe(
        method="autoround", calibration="some", deepstack=deepstack,
        bits=4, group_size=128, sym=True, iters=1, lr=0.01, seed=1,
    )  # fmt: skip


def load() -> Any:
    return load_model(GOLDEN, torch.float32, CPU)


def samples() -> list[Sample]:
    processor = load_processor(GOLDEN, 64)
    image = Image.linear_gradient("L")
    return [
        dict(processor.process_images([image.resize((160, 128))])),
        dict(processor.process_texts(["net value of the index"])),
        dict(processor.process_images([image.rotate(90).resize((96, 224))])),
    ]


@torch.inference_mode()
def test_outputs_are_bit_identical() -> None:
    plain, folded = load(), load()
    fold_deepstack(folded)
    processor = load_processor(GOLDEN, 64)
    batch = processor.process_images([Image.new("RGB", (64, 256)), Image.linear_gradient("L")])
    for inputs in (*samples(), batch):
        assert torch.equal(plain(**inputs).embeddings, folded(**inputs).embeddings)


@torch.inference_mode()
def layer_inputs(model: Any, inputs: Sample) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    for layer in model.get_submodule(BLOCKS):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True
        )
    model(**inputs)
    return seen


def tuned_on(
    used: list[Sample], recipe: AutoRoundRecipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[int, list[torch.Tensor]]:
    """Return the inputs that AutoRound gives each layer before the layer is changed."""
    seen: dict[int, list[torch.Tensor]] = {}
    load_layer = layers.load_layer

    def load_watched(source: Checkpoint, front: Any, index: int, dtype: Any) -> Any:
        block = load_layer(source, front, index, dtype)

        def record(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if len(seen.setdefault(index, [])) < len(used):
                seen[index].append((args or (kwargs["hidden_states"],))[0].detach().clone())

        block.register_forward_pre_hook(record, with_kwargs=True)
        return block

    monkeypatch.setattr(layers, "load_layer", load_watched)
    allocation = uniform("r", recipe, inspect_folder(GOLDEN)[0]["config"])
    with Scratch(folder, "key") as scratch:
        make_checkpoint(Job(Checkpoint.read(GOLDEN), allocation, recipe, used, CPU, scratch))
    return seen


@pytest.mark.parametrize("folded", [True, False])
def test_autoround_tunes_on_the_true_inputs_only_when_folded(
    folded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = samples()
    recipe = RECIPE.model_copy(update={"deepstack": folded})
    seen = tuned_on(used, recipe, tmp_path / "scratch", monkeypatch)
    wanted = [layer_inputs(load(), sample) for sample in used]
    gaps = {
        number: max(
            float((a - w[number]).abs().max()) for a, w in zip(seen[number], wanted, strict=True)
        )
        for number in range(4)
    }
    assert gaps[0] == 0
    for number in (1, 2, 3):
        assert (gaps[number] == 0) == folded, gaps
