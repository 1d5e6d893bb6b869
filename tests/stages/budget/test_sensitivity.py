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
from stages.budget import sensitivity
from stages.budget.sensitivity import measure, parts_of, room_for
from stages.quantization.activations import Sample
from stages.quantization.deepstack import fold_deepstack, fold_into_layer
from stages.quantization.gptq import quantize_weight
from stages.quantization.layers import load_front, load_layer
from stages.quantization.sample_packs import attend_within_samples

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


def rounded(
    weight: torch.Tensor, _: torch.Tensor, bits: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to nearest in its own bits, in place of GPTQ."""
    pairs = [
        round_to_nearest(row[None], int(width), group_size)
        for row, width in zip(weight, bits, strict=True)
    ]
    codes, scales = zip(*pairs, strict=True)
    return torch.cat(codes), torch.cat(scales)


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
    patch.setattr(sensitivity, "quantize_weight", rounded)
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
    for name in parts_of(CONFIG, 128)[part]:
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
    assert losses.keys() == parts_of(CONFIG, 128).keys()
    assert {tuple(item) for item in losses.values()} == {("3", "8")}
    vision = [part for part in losses if part.startswith("vision_")]
    assert len(vision) == 3 + CONFIG["vision_config"]["depth"]
    assert all(losses[part]["3"]["queries"] < 1e-6 for part in vision)


def test_linears_are_quantized_by_gptq_at_all_widths_and_come_back() -> None:
    one, two = torch.nn.Linear(64, 8), torch.nn.Linear(64, 4)
    module = torch.nn.Sequential(one, two)
    tokens = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).double()
    hessian = tokens.T @ tokens
    weights = sensitivity.quantized_weights(module, ["0", "1"], 32, hessian)
    assert weights.keys() == {2, 3, 4, 8}
    for bits, at_width in weights.items():
        for name, linear in (("0", one), ("1", two)):
            expected = dense_weight(*quantize_weight(linear.weight.data, hessian, bits, 32))
            torch.testing.assert_close(at_width[name], expected)
    before = one.weight.data.clone()
    with pytest.raises(RuntimeError), sensitivity.replaced(module, weights[3]):
        assert torch.equal(one.weight.data, weights[3]["0"])
        raise RuntimeError
    assert torch.equal(one.weight.data, before)


@pytest.mark.parametrize(
    ("device", "nbytes", "place"),
    [("cuda:1", 50, "cuda:1"), ("cuda:1", 51, "cpu"), ("cpu", 1 << 60, "cpu")],
)
def test_states_stay_on_a_gpu_if_they_take_half_of_what_is_free(
    device: str, nbytes: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def free(which: torch.device) -> tuple[int, int]:
        asked.append(which)
        return 100, 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    assert room_for(nbytes, torch.device(device)) == torch.device(place)
    assert asked == ([] if device == "cpu" else [torch.device(device)])
