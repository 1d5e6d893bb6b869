"""Runs that differ are counted and measured, by hand; on a CPU the runtime's do not."""

import json
import math
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from colqwen3.serving import load_runtime
from colqwen3.serving.runtime import Runtime
from demo.benchmarks import repeatability


def test_what_differs_by_hand() -> None:
    runs = cycle([torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [1.0, 0.0]])])
    found = repeatability.compare_runs(lambda: next(runs))
    assert (found["numbers"], found["differing"]) == (4, 2)
    assert math.isclose(found["largest_1_minus_cosine"], 1 - 24 / 25)


def test_on_a_cpu_each_run_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = [], tmp_path / "bits.json"

    def load(*how: Any) -> Runtime:
        asked.append("load")
        return load_runtime(*how)

    monkeypatch.setattr(repeatability, "load_runtime", load)
    monkeypatch.setattr(repeatability, "make_deterministic", lambda: asked.append("same bits"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "restored")
    monkeypatch.setattr(repeatability, "BATCHES", {"queries": (1, 3), "pages": (1,)})
    monkeypatch.setattr(repeatability, "PAGE_PIXELS", (64, 96))
    arguments = ["--model", "tests/golden/model", "--weights", "random", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["repeatability", *arguments, "--out", str(out)])
    repeatability.main()
    results = json.loads(out.read_text())
    assert asked == ["load", "same bits", "load"]
    assert results["batches"].keys() == {"1 queries", "3 queries", "1 pages"}
    for batch in results["batches"].values():
        assert batch.keys() == {"default", "deterministic"}
        assert all(
            each["differing"] == 0 and each["numbers"] and each["ms"] > 0 for each in batch.values()
        )
        assert all(each["largest_1_minus_cosine"] < 1e-12 for each in batch.values())
