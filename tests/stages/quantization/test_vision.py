"""What blocks and mergers of the vision tower are tuned on, against the tower run as a whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import VISION, all_linears, vision_part
from colqwen3.model.loading import load_processor
from stages.quantization import vision
from stages.quantization.activations import Sample, SamplesLostError
from stages.quantization.layers import load_front
from stages.quantization.recipes import AutoRoundRecipe, GptqRecipe, TunedRecipe
from stages.quantization.tuning import tune_layer
from stages.quantization.vision import tune_vision

DEMO = Path("demo/model")
CPU = torch.device("cpu")
WEIGHTS: dict[str, Any] = {"calibration": "any", "bits": 4, "group_size": 32, "sym": True}
GPTQ = GptqRecipe(method="gptq", **WEIGHTS)
TUNED = AutoRoundRecipe(
    method="autoround", iters=2, lr=0.005, gradient_accumulate_steps=1, seed=1, **WEIGHTS
)


def samples() -> list[Sample]:
    processor = load_processor(DEMO, 64)
    sizes = ((128, 192), (160, 96))
    images = [Image.radial_gradient("L").resize(size) for size in sizes]
    return [
        dict(processor.process_texts(["net value"])),
        *(dict(processor.process_images([image])) for image in images),
    ]


def tower() -> Any:
    return load_front(Checkpoint.read(DEMO), torch.float32, CPU).vlm.model.visual


def widths(*parts: str) -> dict[str, int]:
    return {
        name: 4
        for name in all_linears(json.loads((DEMO / "config.json").read_text()))
        if name.startswith(f"{VISION}.") and vision_part(name) in parts
    }


@torch.no_grad()
def inputs_of(whole: Any, used: list[Sample]) -> dict[str, list[torch.Tensor]]:
    """Return what each block and merger is given in a forward of the whole tower."""
    seen: dict[str, list[torch.Tensor]] = {}
    modules = {f"blocks.{i}": block for i, block in enumerate(whole.blocks)}
    modules |= {f"deepstack_merger_list.{i}": m for i, m in enumerate(whole.deepstack_merger_list)}
    modules["merger"] = whole.merger
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].clone())
        )
    for sample in used:
        if "pixel_values" in sample:
            whole(sample["pixel_values"], grid_thw=sample["image_grid_thw"])
    return seen


@pytest.mark.parametrize("recipe", [GPTQ, TUNED], ids=["gptq", "autoround"])
@pytest.mark.parametrize("parts", [("attention", "mergers"), ("attention", "mlp", "mergers")])
def test_everything_is_tuned_on_its_inputs_in_the_finished_tower(
    recipe: TunedRecipe, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    used, bits = samples(), widths(*parts)
    given: list[tuple[Any, Any]] = []

    def watch(layer: Any, inputs: Any, hidden: Any, quantized: Any, *rest: Any) -> Any:
        through = None if quantized is None else [state.clone() for state in quantized]
        given.append(([state.clone() for state in hidden], through))
        return tune_layer(layer, inputs, hidden, quantized, *rest)

    monkeypatch.setattr(vision, "tune_layer", watch)
    original = inputs_of(tower(), used)
    quantized = tower()
    names = []
    for done in tune_vision(tower(), used, recipe, bits, CPU):
        name = done.name.removeprefix(f"{VISION}.")
        names.append(name)
        expected = {n for n in bits if n.startswith(f"{done.name}.")}
        changed = {n for n, m in done.layer.named_modules() if hasattr(m, "scale")}
        assert {f"{done.name}.{n.removeprefix(done.prefix)}" for n in changed} == expected
        for linear in changed:
            module: Any = done.layer.get_submodule(linear)
            weight = module.weight.detach().float()
            target = quantized.get_submodule(f"{name}.{linear.removeprefix(done.prefix)}")
            target.weight.data = weight.clone()
    finished = inputs_of(quantized, used)
    assert names == [*sorted(finished, key=names.index)]
    for name, (full, through) in zip(names, given, strict=True):
        for page, state in enumerate(full):
            torch.testing.assert_close(state[0], original[name][page], rtol=1e-4, atol=1e-4)
        for page, state in enumerate(through or []):
            torch.testing.assert_close(state[0], finished[name][page], rtol=1e-3, atol=1e-3)
    assert given[0][1] is None and all(through for _, through in given[1:])


def test_without_pages_it_says_what_to_do() -> None:
    with pytest.raises(SamplesLostError, match=r"has no pages.*vision: 16"):
        list(tune_vision(tower(), samples()[:1], GPTQ, widths("mlp"), CPU))
