"""How the final embeddings depend on the outputs of each linear, for GPTQ by the whole model.

GPTQ of a layer takes every output of a linear for as important as any other. Here the loss of the
embeddings is taken to second order instead, |J e|^2 / 2 for an error e of a linear's outputs, with J
their effect on the final unit vectors. For each linear its J^T J is estimated by random vectors and
kept as two factors: a weight of each token, and a matrix over outputs that is the same for all. That
is the idea of Tseng et al., "Model-Preserving Adaptive Rounding" (YAQA), arXiv:2505.22988; the
factors here are simpler: tokens are taken as independent, and nothing is iterated.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from colqwen3.system.progress import track
from stages.quantization.activations import Sample
from stages.quantization.end_to_end import Network
from stages.quantization.sample_packs import unpack_samples

DRAWS = 2
"""Random vectors a sample."""
SEED = 5


@dataclass(frozen=True)
class Effect:
    """What an error in the outputs of one linear does to the final embeddings.

    Attributes
    ----------
    weights
        Float [tokens] for each pack of samples: the sum of squares of the gradients of each token.
    outer
        Float [out_features, out_features]: the sum of g g^T over gradients g of all tokens.
    """

    weights: Sequence[torch.Tensor]
    outer: torch.Tensor


Effects = Mapping[str, Effect]
"""By the linear's name in its layer."""


def effects_bytes(outputs: Sequence[int], tokens: int) -> int:
    """Return the bytes of the effects of linears of so many outputs each, by their float32."""
    return 4 * sum(count * count + tokens for count in outputs)


def write_effects(path: Path, effects: Effects) -> None:
    """Write the effects of the linears of a layer to a safetensors file."""
    tensors = {}
    for name, effect in effects.items():
        tensors[f"{name}/outer"] = effect.outer.cpu()
        tensors |= {f"{name}/{pack}": weights for pack, weights in enumerate(effect.weights)}
    save_file(tensors, path)


def read_effects(path: Path) -> dict[str, Effect]:
    """Read what `write_effects` wrote."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = tensor
    return {
        name: Effect([found[str(pack)] for pack in range(len(found) - 1)], found["outer"])
        for name, found in parts.items()
    }


def measure_effects(
    network: Network, packs: Sequence[Sample], kinds: Sequence[str]
) -> list[dict[str, Effect]]:
    """Return what errors of each linear of each decoder layer do.

    Parameters
    ----------
    network
        The full-precision model, all layers with plain linears.
    packs
        What its first layer is given, one sample or a pack of them each.
    kinds
        ``query``, ``page`` or ``passage`` for each sample, in the order in which
        `pack_samples` was given them. Each kind
        weighs as much as any other.
    """
    total: dict[str, int] = {}
    for number, pack in enumerate(packs):
        for sample, kind in zip(unpack_samples([pack]), kinds[number :: len(packs)], strict=True):
            total[kind] = total.get(kind, 0) + sample["hidden_states"].shape[1]
    # on the CPU, so that the vectors are the same wherever the model runs
    source = torch.Generator().manual_seed(SEED)
    with _watch(network) as seen:
        for number, pack in enumerate(track(packs, "whole-model gradients", len(packs))):
            samples = unpack_samples([pack])
            lengths = [sample["hidden_states"].shape[1] for sample in samples]
            shares = [total[kind] ** -0.5 for kind in kinds[number :: len(packs)]]
            scale = torch.tensor(shares).repeat_interleave(torch.tensor(lengths))
            given = [
                # layers hold no parameter that needs a gradient: without this nothing would have one
                {**sample, "hidden_states": sample["hidden_states"].float().requires_grad_()}
                for sample in samples
            ]
            for _ in range(DRAWS):
                embeddings = network.embed(given)
                vectors = torch.randn(embeddings.shape, generator=source) * scale[:, None]
                embeddings.backward(vectors.to(embeddings.device))  # type: ignore[no-untyped-call]
            for sums in seen.values():
                sums.end_pack()
    effects: list[dict[str, Effect]] = [{} for _ in network.layers]
    for (index, name), sums in seen.items():
        effects[index][name] = Effect(sums.weights, sums.outer)
    return effects


class _Sums:
    """What is added up for one linear."""

    def __init__(self, outputs: int, device: torch.device) -> None:
        self.outer = torch.zeros(outputs, outputs, device=device)
        self.weights: list[torch.Tensor] = []
        self._pack: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        """Add the gradient [1, tokens, out_features] of one random vector."""
        rows = gradient.flatten(0, -2).float()
        self.outer.addmm_(rows.T, rows)
        squares = rows.square().sum(-1)
        self._pack = squares if self._pack is None else self._pack + squares

    def end_pack(self) -> None:
        """Keep the weights of a pack's tokens; the next gradients are of other tokens."""
        assert self._pack is not None
        self.weights.append(self._pack.cpu())
        self._pack = None


@contextmanager
def _watch(network: Network) -> Iterator[dict[tuple[int, str], _Sums]]:
    """Add up the gradients of the outputs of all linears of the layers within the context."""
    seen: dict[tuple[int, str], _Sums] = {}
    handles = []
    for index, layer in enumerate(network.layers):
        for name, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                sums = seen[index, name] = _Sums(linear.out_features, network.device)

                def attend(_: Any, args: Any, output: torch.Tensor, sums: _Sums = sums) -> None:
                    if output.requires_grad:
                        output.register_hook(sums.add)  # type: ignore[no-untyped-call]

                handles.append(linear.register_forward_hook(attend))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
