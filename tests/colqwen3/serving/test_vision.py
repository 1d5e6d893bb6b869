"""The vision tower against transformers' own, for pages of different sizes in one batch."""

from pathlib import Path

import torch

from colqwen3.model import ColQwen3Config
from colqwen3.model.loading import load_model
from colqwen3.serving.fused import PLAIN
from colqwen3.serving.weights import Weights, build_tower
from colqwen3.system.files import read_json

GOLDEN, CPU, F32 = Path("tests/golden/model"), torch.device("cpu"), torch.float32
GRIDS = [(1, 4, 6), (1, 4, 6), (1, 8, 2), (1, 4, 6), (1, 12, 10)]


@torch.inference_mode()
def test_tower_equals_transformers() -> None:
    visual = load_model(GOLDEN, F32, CPU).vlm.model.visual
    config = ColQwen3Config.from_dict(read_json(GOLDEN / "config.json", ""))
    tower = build_tower(Weights(GOLDEN, CPU, F32, {}), config)
    generator = torch.Generator().manual_seed(0)
    patches = sum(rows * columns for _, rows, columns in GRIDS)
    pixels = torch.randn(patches, visual.patch_embed.proj.weight[0].numel(), generator=generator)
    expected = visual(pixels, grid_thw=torch.tensor(GRIDS))
    places = tower.places(GRIDS)
    assert [pages for _, pages in places.runs] == [2, 1, 1, 1]
    actual, features = tower.run(pixels, places, PLAIN)
    torch.testing.assert_close(actual, expected.pooler_output, atol=1e-5, rtol=1e-5)
    assert len(features) == len(expected.deepstack_features) == 3
    for ours, theirs in zip(features, expected.deepstack_features, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
