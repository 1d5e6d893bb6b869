"""What counts as agreement, and, where there is a GPU, recordings that replay on other inputs."""

import itertools
from collections.abc import Callable

import pytest
import torch

from colqwen3.serving.recording import RecentlyUsed, Recorder, agree

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def unit(*values: float) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor([values], dtype=torch.float32), dim=-1)


def test_rounding_agrees_and_other_directions_do_not() -> None:
    assert agree(unit(1, 2, 3), unit(1, 2, 3.01))
    assert not agree(unit(1, 2, 3), unit(3, 2, 1))
    assert not agree(torch.cat([unit(1, 0), unit(0, 1)]), torch.cat([unit(1, 0), unit(1, 0)]))
    assert not agree(unit(1, 2) * torch.nan, unit(1, 2))


def test_what_was_used_longest_ago_is_forgotten() -> None:
    recent: RecentlyUsed[str | None] = RecentlyUsed(2)
    recent.put(1, "one")
    recent.put(2, None)
    assert (recent.get(1), recent.get(2), recent.get(3)) == ("one", None, None)
    assert recent.get(1) == "one"
    recent.put(3, "three")
    assert (1 in recent, 2 in recent, 3 in recent, len(recent)) == (True, False, True, 2)
    recent.put(1, "again")  # putting is a use too
    recent.put(4, "four")
    assert (recent.get(1), 3 in recent) == ("again", False)


def products() -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward on [tokens, 2048] whose intermediate results take memory."""
    weight = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def work(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = x @ weight
        return torch.nn.functional.normalize(x.float(), dim=-1)

    return work


@needs_gpu
def test_recordings_take_no_memory_of_their_own() -> None:
    work = products()
    recorder = Recorder(torch.device("cuda"))
    kept, taken = [], []
    for tokens in (512, 448, 384, 320, 256):
        x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
        kept.append(recorder.record(work, x))
        taken.append(torch.cuda.memory_allocated())
    outputs = 448 * 2048 * (4 + 2)  # vectors and inputs are the recording's own
    assert max(after - before for before, after in itertools.pairwise(taken)) < 2 * outputs


@needs_gpu
def test_what_runs_unrecorded_uses_the_memory_of_recordings_and_keeps_its_own_result() -> None:
    work = products()
    recorder = Recorder(torch.device("cuda"))
    sizes = 16384, 16384, 8192
    inputs = [torch.randn(n, 2048, device="cuda", dtype=torch.bfloat16) for n in sizes]
    recording = recorder.record(work, inputs[0].clone())
    expected = [work(x).cpu() for x in inputs]
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    vectors = recorder.run(work, inputs[1])
    result = 16384 * 2048 * 4
    assert torch.cuda.memory_reserved() - reserved <= result + (20 << 20)
    replayed = recording.replay(inputs[0])
    again = recorder.run(work, inputs[2])
    for actual, x in ((replayed, 0), (vectors, 1), (again, 2)):
        torch.testing.assert_close(actual.cpu(), expected[x], atol=1e-3, rtol=0)
    with pytest.raises(OSError, match="half way"):
        recorder.run(lambda x: fails(work(x)), inputs[1])
    assert torch.cuda.current_stream() != recorder.stream
    torch.testing.assert_close(recording.replay(inputs[0]).cpu(), expected[0], atol=1e-3, rtol=0)
    del recording
    before = torch.cuda.memory_reserved()
    recorder.free()
    assert before - torch.cuda.memory_reserved() >= result


def fails(_: torch.Tensor) -> torch.Tensor:
    raise OSError("half way")


def test_a_run_without_memory_is_repeated_once_the_cache_is_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []

    def run_once(work: object, inputs: torch.Tensor) -> torch.Tensor:
        happened.append("run")
        if "emptied" not in happened:
            raise torch.OutOfMemoryError
        return inputs

    recorder = Recorder.__new__(Recorder)  # without a GPU there is no stream
    monkeypatch.setattr(recorder, "_run", run_once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("emptied"))
    assert recorder.run(lambda x: x, torch.ones(1)) == 1
    assert happened == ["run", "emptied", "run"]


@needs_gpu
def test_a_recording_replays_on_other_inputs() -> None:
    weight = torch.randn(8, 8, device="cuda")

    def work(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x @ weight, dim=-1)

    recorder = Recorder(torch.device("cuda"))
    recording = recorder.record(work, torch.randn(4, 8, device="cuda"))
    first, second = torch.randn(4, 8, device="cuda"), torch.randn(4, 8, device="cuda")
    remaining = recording.replay(first)
    recording.replay(second)
    assert torch.equal(remaining, work(first)), (
        "what was returned must not change with the next replay"
    )
