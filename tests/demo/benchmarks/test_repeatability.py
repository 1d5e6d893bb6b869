"""Runs that differ are counted and measured, by hand; on a CPU the runtime's do not."""

import json
import math
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch

from demo.benchmarks import repeatability


def test_what_differs_by_hand() -> None:
    runs = cycle([torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [1.0, 0.0]])])
    found = repeatability.compare_runs(lambda: next(runs))
    assert (found["numbers"], found["differing"]) == (4, 2)
    assert math.isclose(found["largest_difference"], 1 - 24 / 25)


def test_on_a_cpu_each_run_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = [], tmp_path / "bits.json"
    monkeypatch.setattr(repeatability, "make_deterministic", lambda: asked.append(True))
    monkeypatch.setattr(repeatability, "BATCHES", {"queries": (1, 3), "pages": (1,)})
    monkeypatch.setattr(repeatability, "PAGE_PIXELS", (64, 96))
    arguments = ["--model", "tests/golden/model", "--weights", "random", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["repeatability", *arguments, "--out", str(out)])
    repeatability.main()
    results = json.loads(out.read_text())
    assert asked == [True]
    assert results["batches"].keys() == {"1 queries", "3 queries", "1 pages"}
    for batch in results["batches"].values():
        assert batch.keys() == {"default", "deterministic"}
        assert all(
            each["differing"] == 0 and each["numbers"] and each["ms"] > 0 for each in batch.values()
        )
        assert all(each["largest_difference"] < 1e-12 for each in batch.values())
