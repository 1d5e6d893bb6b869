"""Feeding the training: processes that draw batches, and the way of a batch to the device.

A batch crosses from process to process as one block of shared memory with a name.  Sent as
tensors, each of its twelve would need a handshake with the process that drew it, which answers only
between two lines of its own work (with one such process 75 ms a batch instead of 25).
"""

import multiprocessing
import pickle
import queue
import random
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo.drawing.text import Corpus
from demo.training.network import PATCH
from demo.training.samples import Batch, Difficulty, PageMaker

ALIGNMENT = 16
ENDED = -1


@dataclass(frozen=True)
class Stage:
    """Part of the training.

    Attributes
    ----------
    until : float
        Fraction of the training time at which the stage ends.
    levels : tuple of Difficulty
        What its pages look like; each batch takes one at random.
    patches : int
        Patches in a batch, which decides the number of pages.
    queries : int
        Queries a page; without any, only the vision tower is trained, to read.
    remember : bool
        Whether pages of the last batches are wrong answers too.
    """

    until: float
    levels: tuple[Difficulty, ...]
    patches: int
    queries: int
    remember: bool = False


@dataclass(frozen=True)
class Parcel:
    """A batch on its way.

    Attributes
    ----------
    stage : int
        Stage of the curriculum it was drawn for.
    memory : str
        Name of the block of shared memory with the bytes of all its tensors.
    parts : dict
        Element type, shape and first byte of each tensor.
    words : int
        The batch's number of words.
    """

    stage: int
    memory: str
    parts: dict[str, tuple[torch.dtype, torch.Size, int]]
    words: int


def _bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def pack(batch: Batch, stage: int) -> Parcel:
    """Copy a batch to shared memory, which whoever unpacks it frees."""
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    parts, size = {}, 0
    for name, value in tensors.items():
        parts[name] = value.dtype, value.shape, size
        size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
    memory = SharedMemory(create=True, size=size)
    flat = torch.frombuffer(memory.buf, dtype=torch.uint8)
    for name, value in tensors.items():
        flat[parts[name][2] :][: value.nbytes] = _bytes(value)
    del flat
    memory.close()
    return Parcel(stage, memory.name, parts, batch.words)


def unpack(parcel: Parcel, device: str, number: int) -> Batch:
    """Copy a parcel to a device, free its memory and return it as the batch of this number."""
    memory = SharedMemory(parcel.memory)
    flat = torch.frombuffer(memory.buf, dtype=torch.uint8)
    there = flat.to(device, copy=True)
    del flat
    memory.close()
    memory.unlink()
    tensors = {
        name: there[begin:][: dtype.itemsize * shape.numel()].view(dtype).view(shape)
        for name, (dtype, shape, begin) in parcel.parts.items()
    }
    return Batch(**tensors, words=parcel.words, number=number)


def draw_forever(
    pages: "Queue[Parcel]",
    stage: "Synchronized[int]",
    source: Path,
    seed: int,
    plan: tuple[Stage, ...],
) -> None:
    """Keep a queue full of batches of the current stage; runs in a process of its own.

    ``source`` is a pickle of the corpus, the fonts and the tokenizer as text.  It is no argument
    because one larger than a pipe's buffer makes each start wait for the process before it.
    """
    torch.set_num_threads(1)
    corpus, fonts, tokenizer = pickle.loads(source.read_bytes())
    maker = PageMaker(corpus, fonts, Tokenizer.from_str(tokenizer), seed)
    rng = random.Random(seed)
    while (number := stage.value) != ENDED:
        now = plan[number]
        level = rng.choice(now.levels)
        count = max(4, now.patches * PATCH * PATCH // (level.width * level.height))
        pages.put(pack(maker.batch(level, count, now.queries), number))


class Drawing:
    """Processes that draw batches of the current stage into a queue.

    Parameters
    ----------
    workers : int
        How many processes.
    source : tuple
        Corpus, fonts and the tokenizer as text.
    seed : int
        Seed of the first process; the others take different ones.
    plan : tuple of Stage
        The curriculum.
    stage : int
        Where in it to begin.
    """

    def __init__(
        self,
        workers: int,
        source: tuple[Corpus, list[str], str],
        seed: int,
        plan: tuple[Stage, ...],
        stage: int,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pages: Queue[Parcel] = context.Queue(maxsize=max(8, 2 * workers))
        self.stage: Synchronized[int] = context.Value("i", stage)
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "source"
        file.write_bytes(pickle.dumps(source))
        self._processes = [
            context.Process(
                target=draw_forever,
                args=(self.pages, self.stage, file, seed + 1000 * worker, plan),
                daemon=True,
            )
            for worker in range(workers)
        ]
        for process in self._processes:
            process.start()

    def wait(self) -> None:
        """Return when the first batch is there."""
        while self.pages.empty():
            time.sleep(0.1)
            if not any(process.is_alive() for process in self._processes):
                raise RuntimeError("no drawing process is running")

    def close(self) -> None:
        """End the processes after the batch each is drawing, and free what they left."""
        self.stage.value = ENDED
        running = True
        while running:
            running = any(process.is_alive() for process in self._processes)
            try:
                SharedMemory(self.pages.get(timeout=0.2).memory).unlink()
                running = True
            except queue.Empty:
                pass
        self._folder.cleanup()


class Replay:
    """Gives every drawn batch up to ``uses`` times, some steps apart, as drawing costs time too.

    Batches are kept on the device.
    """

    def __init__(self, source: "Queue[Parcel]", uses: int, seed: int, device: str) -> None:
        self.source = source
        self.uses = uses
        self.device = device
        self.batches = 0
        self.kept: list[tuple[int, int, Batch]] = []
        self.rng = random.Random(seed)
        self.drawn = 0

    def next(self, stage: int) -> Batch:
        """Return a batch: a new one if there is one or too few are kept, else one seen before."""
        self.kept = [item for item in self.kept if item[0] == stage]
        try:
            parcel = self.source.get(block=len(self.kept) < 12, timeout=60)
        except queue.Empty:
            index = self.rng.randrange(len(self.kept))
            number, left, batch = self.kept.pop(index)
            if left > 1:
                self.kept.append((number, left - 1, batch))
            return batch
        self.batches += 1
        batch = unpack(parcel, self.device, self.batches)
        self.drawn += len(batch.pages)
        if self.uses > 1:
            self.kept = [*self.kept[-47:], (parcel.stage, self.uses - 1, batch)]
        return batch
