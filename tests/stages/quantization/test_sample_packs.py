"""Samples packed into one forward of a layer give what each gives alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.model.loading import load_processor
from stages.quantization.activations import capture_inputs, unflatten
from stages.quantization.deepstack import fold_deepstack, fold_into_layer
from stages.quantization.layers import load_front, load_layer
from stages.quantization.sample_packs import LENGTHS, attend_within_samples, pack_samples

GOLDEN = Path("tests/golden/model")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def front() -> Any:
    model = load_front(Checkpoint.read(GOLDEN), torch.float32, CPU)
    fold_deepstack(model)
    return model


@pytest.fixture(scope="module")
def inputs(front: Any) -> list[dict[str, torch.Tensor]]:
    processor = load_processor(GOLDEN, 64)
    image = Image.linear_gradient("L")
    samples = [dict(processor.process_texts([text])) for text in ("a", "net value of it", "of b")]
    samples += [dict(processor.process_images([image.resize(s)])) for s in ((160, 128), (96, 224))]
    return capture_inputs(front, front.vlm.model.language_model.layers[0], samples)


def layer(front: Any, index: int) -> Any:
    block = load_layer(Checkpoint.read(GOLDEN), front, index, torch.float32)
    fold_into_layer(block, index)
    return block


@torch.no_grad()
def test_a_pack_gives_what_its_samples_give_alone(
    front: Any, inputs: list[dict[str, torch.Tensor]]
) -> None:
    packs = pack_samples(inputs, 2)
    assert [pack[LENGTHS][0].tolist() for pack in packs] == [
        [item["hidden_states"].shape[1] for item in inputs[first::3]] for first in range(3)
    ]
    plain, packed = layer(front, 1), layer(front, 1)
    attend_within_samples(packed)
    for first, pack in enumerate(packs):
        alone = [plain(**unflatten(item)) for item in inputs[first::3]]
        together = packed(**unflatten(pack)).split(pack[LENGTHS][0].tolist(), dim=1)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    # attention that is not cut at the samples gives something else
    pack = {key: value for key, value in packs[0].items() if key != LENGTHS}
    mixed = plain(**unflatten(pack))[:, -1]
    assert (mixed - packed(**unflatten(packs[0]))[:, -1]).abs().max() > 1e-3


def test_packing_leaves_other_layers_alone(front: Any) -> None:
    first, second = layer(front, 0), layer(front, 1)
    before = second.self_attn.config._attn_implementation
    attend_within_samples(first)
    assert first.self_attn.config._attn_implementation != before
    assert second.self_attn.config._attn_implementation == before


def test_what_cannot_be_packed_is_refused(inputs: list[dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="mask, which cannot be packed"):
        pack_samples([{**inputs[0], "mask": torch.ones(1)}], 2)
