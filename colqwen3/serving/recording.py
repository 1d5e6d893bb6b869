"""Forwards recorded as CUDA graphs: the processor says "go" once instead of for each kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[torch.Tensor], torch.Tensor]

# two ways of the same 16-bit arithmetic differ by less; what is broken differs by far more
LEAST_COSINE = 0.98


@dataclass(frozen=True)
class Recording:
    """A recorded forward: write `inputs`, replay, read `vectors`.

    `kept` are the tensors that the graph reads beside the weights.
    """

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    vectors: torch.Tensor
    kept: object

    def replay(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run it on other inputs of the same shape."""
        self.inputs.copy_(inputs)
        self.graph.replay()
        return self.vectors.clone()


def record(work: Work, inputs: torch.Tensor, pool: Any, kept: object = None) -> Recording:
    """Record `work` on `inputs`, which the recording keeps to itself.

    Parameters
    ----------
    work
        Gives unit vectors [..., embed_dim].
    inputs
        On a GPU.
    pool
        Memory that recordings share: only one of them may run at a time.
    kept
        Tensors that `work` reads, which must live as long as the recording.

    Raises
    ------
    RuntimeError
        If the work cannot be recorded, or the recording gives something else than the work.
    """
    stream: Any = torch.cuda.Stream(inputs.device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(inputs.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # compiles and allocates what a recording may not
        work(inputs)
        wanted = work(inputs)
    current.wait_stream(stream)
    torch.cuda.synchronize(inputs.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        vectors = work(inputs)
    graph.replay()
    if not agree(vectors, wanted):
        raise RuntimeError("it gives other embeddings than the work that it recorded")
    return Recording(graph, inputs, vectors, kept)


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether all unit vectors of two tensors point the same way, but for 16-bit rounding."""
    return float((found * wanted).sum(-1).min()) >= LEAST_COSINE
