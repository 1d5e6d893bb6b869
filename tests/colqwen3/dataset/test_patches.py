"""Patches cut without transformers are those of the processor, which are those of Qwen2-VL's."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from colqwen3.dataset.pages import Page, open_page
from colqwen3.dataset.patches import Cutter
from colqwen3.embedding.embedder import cutter
from colqwen3.model.loading import load_processor
from tests.helpers.odd_pages import PAGES, write_page

MODEL = Path("tests/golden/model")


def test_sizes_are_those_of_smart_resize() -> None:
    generator = np.random.default_rng(0)
    for longest in (4096, 100_000, 1_310_720):
        cut = Cutter(16, 2, min(65536, longest), longest, 3)
        for _ in range(3000):
            width, height = (int(side) for side in 2 ** generator.uniform(3, 12, 2))
            height = min(max(height, width // 190 + 1), width * 190)
            rows, columns = smart_resize(
                height, width, factor=32, min_pixels=cut.shortest, max_pixels=cut.longest
            )
            assert cut.size(width, height) == (columns, rows)


@pytest.mark.parametrize("name", PAGES)
def test_odd_pages_are_cut_as_by_the_processor(tmp_path: Path, name: str) -> None:
    processor = load_processor(MODEL, 1280)
    page = Page(write_page(name, tmp_path))
    actual = cutter(processor).cut(open_page(page))
    with Image.open(page.path) as image:
        inputs = processor.process_images([image])
    assert inputs["image_grid_thw"].tolist() == [list(actual.grid)]
    # both frames, and every channel, rescaled back to 8 bits
    frames = inputs["pixel_values"].view(len(actual.patches), 3, 2, 256)
    for frame in range(2):
        levels = ((frames[:, :, frame] * 0.5 + 0.5) * 255).round().byte()
        assert np.array_equal(levels.flatten(1).numpy(), actual.patches)


def test_visual_tokens_and_caps() -> None:
    for cap in (4, 100, 1280):
        cut = cutter(load_processor(MODEL, cap))
        page = cut.cut(Image.new("RGB", (1700, 2200)))
        assert cut.visual_tokens(page.grid) == len(page.patches) // 4 <= cap


def test_a_process_that_cuts_pages_imports_no_torch() -> None:
    code = (
        "import sys, colqwen3.embedding.preparing; "
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout == "[]\n"
