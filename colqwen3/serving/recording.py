"""Forwards recorded as CUDA graphs: the CPU starts one graph instead of each kernel."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Work = Callable[[torch.Tensor], torch.Tensor]

# two ways of the same 16-bit arithmetic differ by less; what is broken differs by far more
MINIMUM_COSINE = 0.98


class RecentlyUsed(Generic[T]):
    """A mapping that forgets what was used longest ago.

    Parameters
    ----------
    limit
        How many items it holds at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[Hashable, T] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Hashable) -> T | None:
        """Return an item, which counts as a use, or None."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Add or replace an item, which counts as a use."""
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self._limit:
            self._items.popitem(last=False)

    def clear(self) -> None:
        """Forget all items."""
        self._items.clear()


@dataclass(frozen=True)
class Recording:
    """A recorded forward: write `inputs`, replay, read `vectors`.

    `tensors` are those that the graph reads beside the weights.
    """

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    vectors: torch.Tensor
    tensors: object

    def replay(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run it on other inputs of the same shape."""
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.vectors.clone()


class Recorder:
    """Records forwards on one GPU.

    All on one stream: cuBLAS keeps 32 MiB for each stream that it has ever computed on, and what was
    allocated on a stream is used again only there. Recordings, and forwards that are run once, share
    their memory too, so only one of them may run at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._device = device
        self._pool = _memory_pool(device)

    def free(self) -> None:
        """Give back the memory of recordings, of which none may be left."""
        self._pool = _memory_pool(self._device)
        torch.cuda.empty_cache()

    def run(self, work: Work, inputs: torch.Tensor) -> torch.Tensor:
        """Return what `work` gives, without recording it, in the memory that recordings have."""
        # while a pool is in use, torch frees nothing that it has cached elsewhere
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._run(work, inputs)
        torch.cuda.empty_cache()
        return self._run(work, inputs)

    def _run(self, work: Work, inputs: torch.Tensor) -> torch.Tensor:
        current = torch.cuda.current_stream(inputs.device)
        with self._in_memory_of_recordings(current):
            vectors = work(inputs)
        return vectors.clone()  # a recording may write where it was

    @contextlib.contextmanager
    def _in_memory_of_recordings(self, current: Any) -> Iterator[None]:
        self.stream.wait_stream(current)
        try:
            pool = torch.cuda.use_mem_pool(self._pool, current.device)
            with pool, torch.cuda.stream(self.stream):
                yield
        finally:  # also what was begun before a failure writes there
            current.wait_stream(self.stream)

    def record(self, work: Work, inputs: torch.Tensor, tensors: object = None) -> Recording:
        """Record `work` on `inputs`, which the recording keeps to itself.

        Parameters
        ----------
        work
            Gives unit vectors [..., embed_dim].
        inputs
            On the GPU.
        tensors
            Those that `work` reads, which must live as long as the recording.

        Raises
        ------
        RuntimeError
            If the work cannot be recorded, or the recording gives other embeddings than the work.
        """
        torch.cuda.empty_cache()  # what the current stream has cached cannot be used on another
        current = torch.cuda.current_stream(inputs.device)
        with self._in_memory_of_recordings(current):  # does what a recording may not, as compiling
            work(inputs)
            expected = work(inputs)
        torch.cuda.synchronize(inputs.device)
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=self._pool.id, stream=self.stream)
        with torch.cuda.stream(current), capture:  # comes back to it, also where none can begin
            vectors = work(inputs)
        graph.replay()
        if not agree(vectors, expected):
            raise RuntimeError("its embeddings differ from those of the work that it recorded")
        return Recording(graph, inputs, vectors, tensors)


def _memory_pool(device: torch.device) -> Any:
    with torch.cuda.device(device):  # else it would be one of the current GPU
        return torch.cuda.MemPool()


def agree(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all unit vectors of two tensors point the same way, but for 16-bit rounding."""
    return float((actual * expected).sum(-1).min()) >= MINIMUM_COSINE
