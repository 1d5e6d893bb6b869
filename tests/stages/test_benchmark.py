"""What the stage times, and with what it compares; what timing itself does is tested with serving."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colqwen3.system.errors import UserError
from stages import benchmark
from stages.pipeline.params import BenchmarkParams

PARAMS = BenchmarkParams(
    dtype="float32",
    repeats=1,
    warmup=0,
    query_tokens=12,
    query_batches=[1, 2],
    page_batches=[2],
    int8_activations=False,
)
ROWS = [torch.arange(11), torch.arange(14)]


class Runtime:
    """A runtime that only says what it was asked for."""

    device = torch.device("cpu")
    activations = "bfloat16"

    def __init__(self, name: str, log: list[tuple[str, str, str, int]], falls_back: bool) -> None:
        self.name, self.log, self.falls_back = name, log, falls_back
        self.mode = ""

    def use(self, mode: str) -> None:
        self.mode = mode

    def runs(self, mode: str) -> bool:
        return not (self.falls_back and mode == "compiled")

    def run_queries(self, batch: torch.Tensor) -> None:
        self.log.append((self.name, self.mode, "queries", len(batch)))

    def run_pages(self, pages: Any) -> None:
        self.log.append((self.name, self.mode, "pages", len(pages["input_ids"])))


def cut_pages(images: list[str]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(len(images), 77)}


def test_both_models_are_timed_in_turns_on_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.MODES, "cpu", ("eager", "compiled"))
    log: list[tuple[str, str, str, int]] = []
    runtimes = [Runtime("original", log, False), Runtime("quantized", log, True)]
    processor = SimpleNamespace(cut_pages=cut_pages)
    times = benchmark.time_both(runtimes, PARAMS, ROWS, ["a page"], processor)  # type: ignore[list-item]
    assert log == [
        (name, mode, kind, count)
        for mode in ("eager", "compiled")
        for kind, count in (("queries", 1), ("queries", 2), ("pages", 2))
        for name in ("original", "quantized")
    ]
    assert {kind: part["tokens"] for kind, part in times.items()} == {"query": 12, "page": 77}
    # one of them took a slower way when compiled: those times say nothing
    assert times["query"]["batches"].keys() == {"1", "2"}
    assert times["page"]["batches"]["2"].keys() == {"eager", "best"}


def test_a_steady_load_is_timed_where_all_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.MODES, "cpu", ("graphs", "compiled"))
    monkeypatch.setattr(benchmark, "median_ms", lambda works, *rest: [8.0, 4.0])
    log: list[tuple[str, str, str, int]] = []
    given = []

    def sustained_ms(works: Any, single: list[float], device: torch.device) -> list[float]:
        for work in works:
            work()
        given.append(single)
        return [6.0, float(log[-1][-1])]

    monkeypatch.setattr(benchmark, "sustained_ms", sustained_ms)
    runtimes = [Runtime("original", log, False), Runtime("quantized", log, False)]
    processor = SimpleNamespace(cut_pages=cut_pages)
    times = benchmark.time_both(runtimes, PARAMS, ROWS, ["a page"], processor)  # type: ignore[list-item]
    assert {mode for _, mode, _, _ in log} == {"graphs"}
    assert given == [[8.0, 4.0]] * 3
    assert times["query"]["batches"]["1"]["sustained"]["quantized_ms"] == 1
    assert times["query"]["batches"]["2"]["sustained"]["quantized_ms"] == 2
    assert times["page"]["batches"]["2"]["sustained"]["speedup"] == 3
    runtimes[1].runs = lambda mode: mode == "compiled"  # type: ignore[method-assign]
    times = benchmark.time_both(runtimes, PARAMS, ROWS, ["a page"], processor)  # type: ignore[list-item]
    assert len(given) == 3
    assert "sustained" not in times["page"]["batches"]["2"]


def test_runtimes_that_share_no_mode_are_not_timed() -> None:
    runtimes = [Runtime("original", [], False), Runtime("quantized", [], False)]
    runtimes[1].runs = lambda mode: False  # type: ignore[method-assign]
    processor = SimpleNamespace(cut_pages=cut_pages)
    with pytest.raises(UserError, match="none of the modes eager on this machine"):
        benchmark.time_both(runtimes, PARAMS, ROWS, ["a page"], processor)  # type: ignore[list-item]


def test_the_worst_token_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    served = torch.tensor(
        [[[1.0, 0.0], [0.6, 0.8]], [[9.0, 9.0], [9.0, 9.0]]]
    )  # one row of padding
    monkeypatch.setattr("colqwen3.embedding.batches.embed", lambda model, inputs: expected)
    runtime = SimpleNamespace(
        token_ids=lambda queries: None, run_queries=lambda ids: served, run_pages=lambda p: expected
    )
    cosines = benchmark.minimum_cosine(runtime, None, None, None)
    assert cosines == {"query": 0.8, "page": 1.0}


def test_other_activations_than_those_asked_for_are_not_timed() -> None:
    runtime = SimpleNamespace(activations="bfloat16")
    benchmark.check_activations(runtime, "bfloat16")
    with pytest.raises(UserError, match="int8 activations do not work on this machine"):
        benchmark.check_activations(runtime, "int8")


def test_a_runtime_that_fell_back_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    fallen = SimpleNamespace(activations="bfloat16")
    monkeypatch.setattr("colqwen3.serving.load_runtime", lambda *args, **options: fallen)
    device = torch.device("cpu")
    assert benchmark.load(Path("a"), "bfloat16", device, PARAMS) is fallen
    with pytest.raises(UserError, match="int8 activations do not work on this machine"):
        benchmark.load(Path("a"), "int8", device, PARAMS)
