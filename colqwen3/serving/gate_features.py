"""In which order the features lie that a gate is computed of: some of one kind, as many of the other.

A gate multiplies SiLU of some features by others. Where the two alternate, a product that gives both has
what belongs together in one thread, see `humming_gate`.
"""

import torch

RUN = 8
"""Features of one kind in a row, where it divides their number."""


def run_length(width: int) -> int:
    """Return how many features are in a row where there are `width` of each kind."""
    return min(RUN, width & -width)  # the largest power of two that divides it


def alternate(features: torch.Tensor) -> torch.Tensor:
    """Return features in the order that a gate takes.

    Parameters
    ----------
    features
        [tokens, 2 x width]: all of the gate first, and then all that it multiplies.
    """
    width = features.shape[-1] // 2
    runs = features.view(len(features), 2, -1, run_length(width))
    return runs.transpose(1, 2).flatten(1)


def alternating(width: int) -> torch.Tensor:
    """Return that order as integers [2 x width], counted as the features of `alternate` are."""
    return alternate(torch.arange(2 * width).unsqueeze(0)).squeeze(0)
