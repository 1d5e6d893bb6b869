"""The vision tower of a ColQwen3 for serving."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from colqwen3.serving.fused import Operations
from colqwen3.serving.linears import Linear

Grid = tuple[int, int, int]
"""Frames, patch rows and patch columns of a page."""
CACHED_GRIDS = 16  # some megabytes each


class Places(NamedTuple):
    """What the sizes of pages determine.

    Attributes
    ----------
    indices, weights
        [patches, 4]: which learned positions to interpolate for each patch, and how.
    cos, sin
        [patches, head_dim].
    runs
        Grids, and how many pages in a row have each.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    runs: list[tuple[Grid, int]]


@dataclass(frozen=True)
class Norm:
    """Weight and bias of a layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class VisionBlock:
    """Weights of one block of the tower."""

    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class Merger:
    """Four patches to one visual token; `whole`: the norm is over all four at once."""

    norm: Norm
    fc1: Linear
    fc2: Linear
    whole: bool

    def run(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """Return [patches x hidden / width, out_hidden] of [patches, hidden]."""
        if self.whole:
            x = x.view(-1, width)
        x = functional.layer_norm(x, self.norm.weight.shape, self.norm.weight, self.norm.bias, 1e-6)
        merged: torch.Tensor = self.fc2(functional.gelu(self.fc1(x.view(-1, width))))
        return merged


@dataclass
class Tower:
    """The vision tower.

    Attributes
    ----------
    patch_embed
        Pixels of a patch to a hidden state.
    position_embed
        [grid positions, hidden], interpolated to each page.
    rotary
        Positions [2, patches] to cosine and sine [patches, head_dim], as transformers has it.
    blocks, merger
        What the patches go through.
    deepstack
        Number of a block -> the merger that turns its output into deepstack features.
    heads, merge
        Attention heads, and patches per side of a visual token.
    """

    patch_embed: Linear
    position_embed: torch.Tensor
    rotary: Callable[..., Any]
    blocks: Sequence[VisionBlock]
    merger: Merger
    deepstack: dict[int, Merger]
    heads: int
    merge: int

    def __post_init__(self) -> None:
        """Give the tower a cache of its own, which does not refer to it."""
        side = int(len(self.position_embed) ** 0.5)
        find = functools.partial(
            _grid_places, self.rotary, side, self.merge, self.position_embed.device
        )
        self._grid_places = functools.lru_cache(CACHED_GRIDS)(find)

    def places(self, grids: Sequence[Grid]) -> Places:
        """Return what pages of these sizes need besides their pixels, on the tower's device."""
        places = [self._grid_places(grid) for grid in grids]
        indices, weights, cos, sin = (torch.cat(part) for part in zip(*places, strict=True))
        # pages of one size attend in one batch
        runs = [(grid, len(list(pages))) for grid, pages in groupby(grids)]
        return Places(indices, weights, cos, sin, runs)

    def run(
        self, pixels: torch.Tensor, places: Places, operations: Operations
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Turn the patches of pages into visual tokens.

        Parameters
        ----------
        pixels
            [patches, channels x temporal patch x patch x patch], all pages in a row.
        places
            What `places` returned for these pages.
        operations
            What to compute with.

        Returns
        -------
        tuple
            Visual tokens [patches / merge^2, out_hidden], and as many deepstack features for each
            of the first decoder layers.
        """
        around = self.position_embed[places.indices]
        positions = (around * places.weights.unsqueeze(-1)).sum(1)
        x = self.patch_embed(pixels)
        width = x.shape[1] * self.merge**2
        change, features = positions.to(x.dtype), []
        for index, block in enumerate(self.blocks):
            x, h = operations.add_layer_norm(x, change, block.norm1.weight, block.norm1.bias)
            mixed = block.proj(self._attend(block.qkv(h), places, operations))
            x, h = operations.add_layer_norm(x, mixed, block.norm2.weight, block.norm2.bias)
            change = block.fc2(operations.gelu(block.fc1(h)))
            if index in self.deepstack:
                features.append(self.deepstack[index].run(x + change, width))
        return self.merger.run(x + change, width), features

    def _attend(self, qkv: torch.Tensor, places: Places, operations: Operations) -> torch.Tensor:
        parts = qkv.view(len(qkv), 3, self.heads, -1)
        q, k = operations.rotate_vision(parts, places.cos, places.sin)
        mixed, start = [], 0
        for (frames, rows, columns), pages in places.runs:
            size = rows * columns
            end = start + frames * pages * size
            three = (
                part[start:end].unflatten(0, (-1, size)).transpose(1, 2)
                for part in (q, k, parts[:, 2])
            )
            attended = functional.scaled_dot_product_attention(*three)
            mixed.append(attended.transpose(1, 2).reshape(end - start, -1))
            start = end
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def _grid_places(
    rotary: Callable[..., Any], side: int, merge: int, device: torch.device, grid: Grid
) -> tuple[torch.Tensor, ...]:
    """Return indices and weights into the learned positions, cosine and sine, for one page."""
    thw = torch.tensor([grid])
    indices, weights = get_vision_interpolation_indices_and_weights(
        thw,
        num_grid_per_side=side,
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=merge,
    )
    cos, sin = rotary(thw, get_vision_position_ids(thw, merge))
    return tuple(part.to(device) for part in (indices, weights, cos, sin))
