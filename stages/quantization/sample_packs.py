"""Several samples one behind the other in one forward of a decoder layer, unpadded.

Everything in a decoder layer but attention works token by token; attention is done sample by
sample here, so a sample's outputs do not depend on what it is packed with.
"""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

T = TypeVar("T")
LENGTHS = "lengths"
"""Keyword of a packed layer: integer tensor [1, samples], the tokens of each."""
IMPLEMENTATION = "sdpa_within_samples"
# the dimension that counts tokens in what a decoder layer is given
TOKENS = {
    "hidden_states": 1,
    "position_embeddings.0": 1,
    "position_embeddings.1": 1,
    "deepstack": 2,
}


def deal(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Deal items out to as few packs of at most `size` as there can be, each taking every n-th."""
    count = -(-len(items) // size)
    return [items[first::count] for first in range(count)]


def pack_samples(
    samples: Sequence[dict[str, torch.Tensor]], size: int
) -> list[dict[str, torch.Tensor]]:
    """Join inputs of a decoder layer into packs of at most `size` samples.

    Every pack takes each n-th sample, see `deal`, so that all have the same mix of kinds.

    Parameters
    ----------
    samples
        Hidden states [1, tokens, hidden] and the rest, by the names of `TOKENS`.
    size
        Most samples in a pack.

    Raises
    ------
    ValueError
        If a sample holds something that is not known to be joined.
    """
    packs = []
    for parts in deal(samples, size):
        for key in parts[0]:
            if key not in TOKENS:
                raise ValueError(f"a decoder layer is given {key}, which cannot be packed")
        pack = {key: torch.cat([part[key] for part in parts], TOKENS[key]) for key in parts[0]}
        pack[LENGTHS] = torch.tensor([[part["hidden_states"].shape[1] for part in parts]])
        packs.append(pack)
    return packs


def unpack_samples(packs: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Undo `pack_samples`; what is in no pack is returned as it is.

    Parameters
    ----------
    packs
        All that it returned, in order.
    """
    if not packs or LENGTHS not in packs[0]:
        return list(packs)
    split = []
    for pack in packs:
        sizes = pack[LENGTHS].flatten().tolist()
        parts = {
            key: torch.split(value, sizes, TOKENS[key])
            for key, value in pack.items()
            if key != LENGTHS
        }
        split.append([{key: parts[key][place] for key in parts} for place in range(len(sizes))])
    # every pack took each n-th sample, so the first of all packs are the first samples
    longest = max(map(len, split))
    return [pack[place] for place in range(longest) for pack in split if place < len(pack)]


def attend_within_samples(layer: Any) -> None:
    """Have a decoder layer attend within each sample of a pack; it then needs ``lengths``."""
    config = copy.copy(layer.self_attn.config)
    config._attn_implementation = IMPLEMENTATION
    layer.self_attn.config = config


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lengths: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each sample; tensors are [1, heads, tokens, head_dim]."""
    sizes = lengths.flatten().tolist()
    parts = zip(*(torch.split(t, sizes, dim=2) for t in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(IMPLEMENTATION, _attention)
