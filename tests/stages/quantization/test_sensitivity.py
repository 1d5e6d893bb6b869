"""The loss of each part against the whole model with just that part rounded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.packing import dense_weight, round_to_nearest
from colqwen3.model.loading import load_model, load_processor
from stages.quantization import sensitivity
from stages.quantization.activations import Sample
from stages.quantization.deepstack import fold_deepstack, fold_into_layer
from stages.quantization.gptq import quantize_weight
from stages.quantization.layers import load_front, load_layer
from stages.quantization.sample_packs import attend_within_samples
from stages.quantization.sensitivity import measure, parts_of

DEMO = Path("demo/model")
CPU, F32 = torch.device("cpu"), torch.float32
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    processor = load_processor(DEMO, 48)
    page = Image.radial_gradient("L").resize((128, 192))
    return [
        dict(processor.process_texts(["net value"])),
        dict(processor.process_images([page])),
        dict(processor.process_texts(["what is the share of the index"])),
    ]


@pytest.fixture(scope="module")
def losses(samples: list[Sample]) -> dict[str, dict[str, dict[str, float]]]:
    """Losses with plain rounding in place of GPTQ, which the whole model can repeat."""
    source = Checkpoint.read(DEMO)

    def front() -> Any:
        model = load_front(source, F32, CPU)
        fold_deepstack(model)
        return model

    def layer(model: Any, index: int) -> Any:
        loaded = load_layer(source, model, index, F32)
        fold_into_layer(loaded, index)
        attend_within_samples(loaded)
        return loaded

    kinds = ["queries", "pages", "queries"]
    patch = pytest.MonkeyPatch()
    patch.setattr(sensitivity, "quantize_weight", lambda w, _, b, g: round_to_nearest(w, b, g))
    patch.setattr(sensitivity, "BITS", (3, 8))
    try:
        return measure(samples, kinds, CONFIG, 128, front, layer, CPU)
    finally:
        patch.undo()


@torch.no_grad()
def embeddings(model: Any, samples: list[Sample]) -> list[torch.Tensor]:
    return [model(**sample).embeddings[0] for sample in samples]


@pytest.mark.parametrize(
    "part",
    ["layers.0.qkv", "layers.1.down", "layers.3.gate_up", "vision_block.2", "vision_mergers",
     "vision_mlp", "token_embeddings"],
)  # fmt: skip
def test_the_loss_of_a_part_is_that_of_the_whole_model(
    part: str, losses: dict[str, Any], samples: list[Sample]
) -> None:
    model: Any = load_model(DEMO, F32, CPU)
    original = embeddings(model, samples)
    for name in parts_of(CONFIG)[part]:
        weight = model.get_submodule(name).weight
        weight.data = dense_weight(*round_to_nearest(weight.data, 3, 128))
    apart = [
        1 - (actual * wanted).sum(-1).double()
        for actual, wanted in zip(embeddings(model, samples), original, strict=True)
    ]
    expected = {
        "pages": float(apart[1].mean()),
        "queries": float(torch.cat([apart[0], apart[2]]).mean()),
    }
    for kind, value in expected.items():
        assert losses[part]["3"][kind] == pytest.approx(value, rel=2e-2, abs=2e-7)
        assert losses[part]["8"][kind] <= losses[part]["3"][kind] + 1e-6


def test_every_part_has_its_losses(losses: dict[str, Any]) -> None:
    assert losses.keys() == parts_of(CONFIG).keys()
    assert {tuple(item) for item in losses.values()} == {("3", "8")}
    vision = [part for part in losses if part.startswith("vision_")]
    assert len(vision) == 3 + CONFIG["vision_config"]["depth"]
    assert all(losses[part]["3"]["queries"] < 1e-6 for part in vision)


def test_linears_are_quantized_by_gptq_and_come_back() -> None:
    linear = torch.nn.Linear(64, 8)
    module = torch.nn.Sequential(linear)
    before = linear.weight.data.clone()
    tokens = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).double()
    hessian = tokens.T @ tokens
    with sensitivity.quantized(module, ["0"], 3, 32, {"0": hessian}):
        expected = dense_weight(*quantize_weight(before, hessian, 3, 32))
        torch.testing.assert_close(linear.weight.data, expected)
    assert torch.equal(linear.weight.data, before)
    with pytest.raises(RuntimeError), sensitivity.quantized(module, ["0"], 3, 32, {}):
        assert not torch.equal(linear.weight.data, before)
        raise RuntimeError
    assert torch.equal(linear.weight.data, before)
