"""mteb's ColQwen3Wrapper passes `device` to processors that may not take it."""

import torch
from mteb.models.model_implementations.colqwen_models import ColQwen3Wrapper


class Processor:
    """The part of a ColQwen3 processor of a model repository that scores."""

    def score_multi_vector(self, qs, ps):
        """Return MaxSim [queries, pages]."""
        return torch.einsum("qnd,pmd->qpnm", qs, ps).amax(-1).sum(-1)


wrapper = ColQwen3Wrapper.__new__(ColQwen3Wrapper)  # without a checkpoint
wrapper.processor, wrapper.device = Processor(), "cpu"
print(wrapper.similarity(torch.rand(2, 3, 4), torch.rand(5, 6, 4)))
