"""The way of training batches: nothing is lost between processes, and use again has its limit."""

import multiprocessing
import queue
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.drawing.text import Corpus
from demo.training.feed import Drawing, Parcel, Replay, Stage, pack, unpack
from demo.training.samples import Batch, Difficulty


def a_batch(value: int) -> Batch:
    """Return a batch of odd sizes whose tensors all differ; one is empty."""
    generator = torch.Generator().manual_seed(value)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 99, shape, generator=generator)

    return Batch(
        pages=numbers(2, 32, 33).to(torch.uint8),
        letters=numbers(2, 5, 8).to(torch.uint8),
        ids=numbers(3, 7),
        mask=numbers(3, 7) > 50,
        owner=numbers(3),
        tokens=numbers(0, 2),
        here=numbers(5, 2),
        word=numbers(5),
        same=numbers(4, 2),
        also=numbers(3, 2) > 50,
        cell_spelling=numbers(2, 3, 5) / 7,
        token_spelling=numbers(1, 5) / 7,
        words=value,
    )


def test_unpacked_batch_is_the_packed_one_and_its_memory_is_freed() -> None:
    batch = a_batch(5)
    parcel = pack(batch, 3)
    received = unpack(parcel, "cpu", 9)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(received, name).dtype == value.dtype, name
            assert torch.equal(getattr(received, name), value), name
    assert (received.words, received.number, parcel.stage) == (5, 9, 3)
    with pytest.raises(FileNotFoundError):
        unpack(parcel, "cpu", 9)


def test_drawing_ends_and_leaves_nothing() -> None:
    tokenizer = Path("demo/model/tokenizer.json").read_text("utf-8")
    corpus = Corpus(["A short line of text."], ["line", "text", "short"], [], [], {})
    corpus.chain.update({"^^^": ["l"], "^^l": ["i"], "^li": ["n"], "lin": ["e"], "ine": ["$"]})
    plan = (Stage(1.0, (Difficulty(12, 14, 1, 1, 256, 128, 1.0),), 512, 1),)
    drawing = Drawing(1, (corpus, [""], tokenizer), 3, plan, 0)
    drawing.wait()
    batch = Replay(drawing.pages, 1, 3, "cpu").next(0)
    assert batch.pages.shape == (4, 128, 256)
    assert len(batch.ids) == 4
    drawing.close()
    assert drawing.pages.empty()
    assert not any(process.is_alive() for process in multiprocessing.active_children())


def test_replay_uses_each_batch_up_to_the_limit_and_none_of_another_stage() -> None:
    source: Any = queue.Queue()
    for value in range(20):
        source.put(pack(a_batch(value), 0))
    replay = Replay(source, 3, 1, "cpu")
    uses = Counter(replay.next(0).number for _ in range(40))
    assert set(uses) == set(range(1, 21))
    assert max(uses.values()) <= 3
    assert replay.drawn == 40
    source.put(pack(a_batch(99), 1))
    assert replay.next(1).words == 99
    assert {number for number, _, _ in replay.kept} == {1}


def test_replay_gives_what_is_kept_only_when_enough_is() -> None:
    waited: list[bool] = []

    class Source:
        def get(self, block: bool, timeout: float) -> Parcel:
            waited.append(block)
            return pack(a_batch(len(waited)), 0)

    source: Any = Source()
    replay = Replay(source, 2, 1, "cpu")
    for _ in range(13):
        replay.next(0)
    assert waited == [True] * 12 + [False]
