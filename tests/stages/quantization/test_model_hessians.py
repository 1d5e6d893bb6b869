"""What errors of linears do to embeddings, against derivatives of the whole model taken directly."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stages.quantization import model_hessians
from stages.quantization.activations import Sample
from stages.quantization.end_to_end import Network, Tail
from stages.quantization.model_hessians import (
    Effect,
    measure_effects,
    read_effects,
    write_effects,
)
from stages.quantization.sample_packs import pack_samples

CPU = torch.device("cpu")
WIDTH, TOKENS = 6, (3, 2, 4)


class Layer(nn.Module):
    """Mixes channels with two linears; tokens do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH, bias=False)

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        assert lengths.sum() == hidden_states.shape[1]
        change: torch.Tensor = self.second(self.first(hidden_states).tanh())
        return hidden_states + change


def network() -> Network:
    torch.manual_seed(0)
    layers = [Layer().requires_grad_(False) for _ in range(2)]
    tail = Tail(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4, bias=False)).requires_grad_(False)
    return Network(layers, tail, CPU)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [{"hidden_states": torch.randn(1, n, WIDTH, generator=generator)} for n in TOKENS]


def jacobians(model: Network, index: int, name: str, sample: Sample) -> torch.Tensor:
    """Return the derivative [tokens, embed_dim, out_features] by a shift of a linear's outputs."""
    linear: Any = model.layers[index].get_submodule(name)
    tokens = sample["hidden_states"].shape[1]

    def embed(shift: torch.Tensor) -> torch.Tensor:
        handle = linear.register_forward_hook(lambda _, args, output: output + shift)
        try:
            with torch.enable_grad():
                hidden = sample["hidden_states"]
                for layer in model.layers:
                    hidden = layer(hidden, torch.tensor([[tokens]]))
                embeddings: torch.Tensor = model.tail(hidden)[0]
                return embeddings
        finally:
            handle.remove()

    whole = torch.func.jacrev(embed)(torch.zeros(tokens, linear.out_features))
    return torch.stack([whole[token, :, token] for token in range(tokens)])


def every_direction(monkeypatch: pytest.MonkeyPatch, draws: int) -> None:
    """Have each unit vector drawn once for each pack, so that sums over draws are exact."""
    turn = itertools.cycle(range(draws))

    def randn(shape: torch.Size, **_: Any) -> torch.Tensor:
        vectors, place = torch.zeros(shape), next(turn)
        if place < vectors.numel():
            vectors.view(-1)[place] = 1
        return vectors

    monkeypatch.setattr(model_hessians, "DRAWS", draws)
    monkeypatch.setattr(torch, "randn", randn)


@pytest.mark.parametrize("size", [1, 2])
def test_effects_are_those_of_the_derivatives(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, kinds = network(), samples(), ["page", "query", "page"]
    packs: Sequence[Sample] = pack_samples(given, size) if size > 1 else given
    every_direction(monkeypatch, 4 * sum(TOKENS))
    found = measure_effects(model, packs, kinds)
    assert [set(layer) for layer in found] == [{"first", "second"}] * 2
    share = {"page": 1 / 7, "query": 1 / 2}
    for index, layer in enumerate(found):
        for name, effect in layer.items():
            grams = [
                share[kind] * torch.einsum("tdo,tdp->top", *[jacobians(model, index, name, s)] * 2)
                for s, kind in zip(given, kinds, strict=True)
            ]
            torch.testing.assert_close(effect.outer, torch.cat(grams).sum(0))
            order = [gram for first in range(len(packs)) for gram in grams[first :: len(packs)]]
            traces = torch.cat(order).diagonal(dim1=1, dim2=2).sum(1)
            torch.testing.assert_close(torch.cat(list(effect.weights)), traces)
            assert len(effect.weights) == len(packs)


def test_effects_are_the_same_twice_and_survive_a_file(tmp_path: Path) -> None:
    once, again = (measure_effects(network(), samples(), ["page"] * 3) for _ in range(2))
    write_effects(tmp_path / "effects.safetensors", once[0])
    for other in (again[0], read_effects(tmp_path / "effects.safetensors")):
        assert other.keys() == once[0].keys()
        for name, effect in once[0].items():
            same: Effect = other[name]
            assert torch.equal(same.outer, effect.outer)
            assert len(same.weights) == 3
            assert all(map(torch.equal, same.weights, effect.weights))
