"""Deepstack folded into the layers: same output, and AutoRound tunes on the true layer inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stages import quantize
from stages.colqwen3.deepstack import fold_deepstack
from stages.colqwen3.loading import load_model, load_processor
from stages.layout import BLOCKS
from stages.params import AutoRoundRecipe

GOLDEN = Path("tests/golden/model")
CPU = torch.device("cpu")


def recipe(deepstack: bool) -> AutoRoundRecipe:
    return AutoRoundRecipe(
        method="autoround", calibration="some", deepstack=deepstack,
        bits=4, group_size=128, sym=True, iters=1, seed=1,
    )  # fmt: skip


def load() -> Any:
    return load_model(GOLDEN, torch.float32, CPU)


def samples() -> list[quantize.Sample]:
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
def layer_inputs(model: Any, inputs: quantize.Sample) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    for layer in model.get_submodule(BLOCKS):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True
        )
    model(**inputs)
    return seen


def tuned_on(
    model: Any, used: list[quantize.Sample], folder: Path, deepstack: bool
) -> dict[int, list[torch.Tensor]]:
    """Return the inputs that AutoRound gives each block before the block is changed."""
    seen: dict[int, list[torch.Tensor]] = {}
    inside = [False]

    def enter(*_: Any) -> None:
        inside[0] = True

    def record(number: int) -> Any:
        def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if inside[0]:  # the caching forward ends in the first block
                inside[0] = False
            elif len(seen.setdefault(number, [])) < len(used):
                seen[number].append((args or (kwargs["hidden_states"],))[0].detach().clone())

        return hook

    model.register_forward_pre_hook(enter)
    for number, layer in enumerate(model.get_submodule(BLOCKS)):
        layer.register_forward_pre_hook(record(number), with_kwargs=True)
    quantize.quantize(model, load_processor(GOLDEN, 64), recipe(deepstack), used, folder, CPU)
    return seen


@pytest.mark.parametrize("folded", [True, False])
def test_autoround_tunes_on_the_true_inputs_only_when_folded(folded: bool, tmp_path: Path) -> None:
    used = samples()
    seen = tuned_on(load(), used, tmp_path, folded)
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
