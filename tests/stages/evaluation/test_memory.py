"""The evaluation holds one batch of pages, and the scores: never all pages."""

from pathlib import Path

import numpy as np
import pytest

from stages.evaluation import retrieval
from tests.slow.evaluate_memory import Shape, measure_alone, write_both


def test_memory_grows_with_the_scores_alone(tmp_path: Path) -> None:
    shape = Shape(pages=1200, queries=30, tokens=128, width=320)
    write_both(tmp_path, shape)
    result = measure_alone(tmp_path, shape)
    pages = 2 * 4 * shape.pages * shape.tokens * shape.width
    assert result["files"] > pages > 390e6
    # a batch of 16 pages is 2.6 MB a model; its similarities and float64 copies are as large
    assert result["peak_after"] - result["peak_before"] < 60e6 + result["scores"]
    assert 0.9 < result["page_cosine"] < 1


def test_resamples_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    generator = np.random.default_rng

    class Recorder:
        def __init__(self, seed: int) -> None:
            self._generator = generator(seed)

        def integers(self, high: int, size: tuple[int, int]) -> "np.typing.NDArray[np.int64]":
            sizes.append(size[0] * size[1])
            return self._generator.integers(high, size=size)

    monkeypatch.setattr(np.random, "default_rng", Recorder)
    retrieval.bootstrap_interval(np.linspace(-1, 1, 5_000))
    assert sum(sizes) == 10_000 * 5_000
    assert max(sizes) <= 1 << 20
