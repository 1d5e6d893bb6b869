"""The arithmetic around the stopwatch; no test depends on how fast anything is."""

import itertools
import time

import pytest
import torch

from stages.evaluation import timing

CPU = torch.device("cpu")


def test_median_leaves_the_warmup_out_and_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # two clock readings a call; the first work takes 9, 8, 1, 2, 30 seconds, the second 5 each time
    now, readings = 0, []
    for turn, taken in enumerate([9, 8, 1, 2, 30]):
        for length in (taken, 5) if turn % 2 == 0 else (5, taken):
            readings += [now, now + length]
            now += length + 1
    clock = iter(readings)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls: list[str] = []
    works = [lambda: calls.append("first"), lambda: calls.append("second")]
    assert timing.median_ms(works, CPU, warmup=2, repeats=3) == [2000, 5000]
    assert calls == ["first", "second", "second", "first"] * 2 + ["first", "second"]


def test_sustained_leaves_out_the_first_half_second(monkeypatch: pytest.MonkeyPatch) -> None:
    # calls take 125 ms, and twice as long from half a second of the first work on: the card is hot
    now, calls = [0.0], [0, 0]

    def work(number: int) -> None:
        calls[number] += 1
        now[0] += 0.25 if number == 0 and calls[0] > 5 else 0.125

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    works = [lambda: work(0), lambda: work(1)]
    assert timing.sustained_ms(works, [125, 125], CPU) == [250, 125]
    assert calls == [5 + 5, 5 + 5]


@pytest.mark.parametrize("count", [2, 4, 6])
def test_each_work_follows_every_other_once(count: int) -> None:
    orders = [timing.turn_order(count, turn) for turn in range(count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    pairs = [pair for order in orders for pair in itertools.pairwise(order)]
    assert sorted(pairs) == sorted(itertools.permutations(range(count), 2))


def test_rows_keep_the_augmentation_tokens() -> None:
    ids = [torch.arange(13), torch.arange(100, 130)]
    rows = timing.query_rows(ids, tokens=16, count=3)
    suffixes = [list(range(3, 13)), list(range(120, 130)), list(range(3, 13))]
    texts = [[0, 1, 2, 0, 1, 2], [100, 101, 102, 103, 104, 105], [0, 1, 2, 0, 1, 2]]
    assert [row.tolist() for row in rows] == [a + b for a, b in zip(texts, suffixes, strict=True)]


def test_best_takes_each_models_own_fastest_mode() -> None:
    actual = timing.compare_times({"eager": [40.0, 80.0], "graphs": [8.0, 4.0]}, items=2)
    eager = {"original_ms": 40, "quantized_ms": 80, "speedup": 0.5, "speedup_to_best": 0.1}
    assert actual["eager"] == eager
    assert actual["graphs"]["speedup"] == 2
    actual = timing.compare_times({"eager": [6.0, 8.0], "graphs": [8.0, 4.0]}, items=2)
    assert actual["best"] == {
        "original_ms": 6, "quantized_ms": 4, "speedup": 1.5,
        "original_per_second": 333.33, "quantized_per_second": 500,
    }  # fmt: skip


def test_sustained_times_are_no_mode() -> None:
    actual = timing.compare_times({"graphs": [8.0, 4.0]}, items=2, sustained=[6.0, 3.0])
    assert actual["best"]["quantized_ms"] == 4
    assert actual["sustained"] == {"original_ms": 6, "quantized_ms": 3, "speedup": 2}
    assert "sustained" not in timing.compare_times({"graphs": [8.0, 4.0]}, items=2)


def test_8_bit_activations_are_compared_with_the_original_in_16() -> None:
    times = {"graphs": [12.0, 10.0, 8.0, 6.0], "compiled": [11.0, 12.0, 9.0, 4.0]}
    best = timing.compare_times(times, items=3)["best"]
    assert (best["original_int8_ms"], best["quantized_int8_ms"]) == (8.0, 4.0)
    assert (best["original_speedup_int8"], best["speedup_int8"]) == (1.375, 2.75)
    assert best["speedup"] == 1.1
