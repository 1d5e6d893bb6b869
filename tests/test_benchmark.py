"""The stopwatch of the benchmark; no test depends on how fast anything is."""

import pytest
import torch

from stages import benchmark
from stages.compute import choose_device
from stages.errors import PipelineError


def test_median_leaves_the_warmup_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # two clock readings a call: the calls last 9, 8, 1, 2 and 30 seconds
    readings = iter([0, 9, 10, 18, 20, 21, 30, 32, 40, 70])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(readings))
    calls: list[int] = []
    found = benchmark.median_ms(lambda: calls.append(1), torch.device("cpu"), warmup=2, repeats=3)
    assert found == 2000
    assert len(calls) == 5


def test_cuda_without_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(PipelineError, match=r"compute\.device is cuda"):
        choose_device("cuda")
