"""The stopwatch of the benchmark; no test depends on how fast anything is."""

import time

import pytest
import torch

from stages import benchmark


def test_median_leaves_the_warmup_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # two clock readings a call: the calls last 9, 8, 1, 2 and 30 seconds
    readings = iter([0, 9, 10, 18, 20, 21, 30, 32, 40, 70])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    calls: list[int] = []
    found = benchmark.median_ms(lambda: calls.append(1), torch.device("cpu"), warmup=2, repeats=3)
    assert found == 2000
    assert len(calls) == 5
