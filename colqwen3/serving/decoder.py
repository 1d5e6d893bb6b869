"""The text decoder of a ColQwen3 for serving: few kernels, no masks, nothing stored for training.

Sequences are padded on the right. Attention is causal, so what is before the padding does not
change, and no mask is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from colqwen3.serving.fused import Operations
from colqwen3.serving.int8 import Int8Tokens
from colqwen3.serving.linears import DecoderLinear, Gated, Linear

SHORT = 64
"""Tokens up to which attention is one kernel with what comes before it."""
SHORT_HEAD_DIMS = (32, 64, 128, 256)
"""What that kernel's tiles can hold."""


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one decoder layer; linears that read the same input are one.

    Outputs of `gate_up` are as `fused.gate` takes them, or what it gives.
    """

    input_norm: torch.Tensor
    qkv: DecoderLinear
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    o: DecoderLinear
    post_attention_norm: torch.Tensor
    gate_up: DecoderLinear
    down: DecoderLinear


def gated(made: torch.Tensor | Gated, operations: Operations) -> Any:
    """Return the inputs of `down`, given what `gate_up` has made."""
    return made.values if isinstance(made, Gated) else operations.gate(made)


@dataclass(frozen=True)
class Decoder:
    """The decoder layers, final norm and projection.

    Attributes
    ----------
    layers
        First to last.
    norm
        Weight of the final norm.
    projection
        Hidden state to embedding.
    heads, head_dim, eps
        As in the text config.
    """

    layers: Sequence[DecoderLayer]
    norm: torch.Tensor
    projection: Linear
    heads: int
    head_dim: int
    eps: float

    def run(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        operations: Operations,
        deepstack: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Turn token embeddings into unit vectors.

        Parameters
        ----------
        hidden
            [batch, tokens, hidden], padded on the right.
        cos, sin
            [batch x tokens, head_dim].
        operations
            What to compute with.
        deepstack
            Places of the visual tokens among all batch x tokens, and for each of the first layers
            the features [visual tokens, hidden] to add to its output there.

        Returns
        -------
        torch.Tensor
            Float32 [batch, tokens, embed_dim]; meaningless on padding.
        """
        batch, tokens, width = hidden.shape
        x = hidden.reshape(-1, width)
        h = operations.rms_norm(x, self.layers[0].input_norm, self.eps)
        following = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for index, (layer, norm) in enumerate(zip(self.layers, following, strict=True)):
            mixed = self._attend(layer, h, cos, sin, operations, (batch, tokens))
            change = layer.o(operations.attended(mixed))
            x, h = operations.add_rms_norm(x, change, layer.post_attention_norm, self.eps)
            change = layer.down(gated(layer.gate_up(h), operations))
            if deepstack and index < len(deepstack[1]):
                change.index_add_(0, deepstack[0], deepstack[1][index])
            last = index + 1 == len(self.layers)
            add_norm = operations.last_norm if last else operations.add_rms_norm
            x, h = add_norm(x, change, norm, self.eps)
        vectors = functional.normalize(self.projection(h).float(), dim=-1)
        return vectors.view(batch, tokens, -1)

    def _attend(
        self,
        layer: DecoderLayer,
        h: torch.Tensor | Int8Tokens,
        cos: torch.Tensor,
        sin: torch.Tensor,
        operations: Operations,
        shape: tuple[int, int],
    ) -> torch.Tensor:
        qkv = layer.qkv(h)
        qkv = qkv.view(len(qkv), -1, self.head_dim)
        fits = shape[1] <= SHORT and self.head_dim in SHORT_HEAD_DIMS
        if operations.short_attention and fits:
            mixed: torch.Tensor = operations.short_attention(
                qkv, layer.q_norm, layer.k_norm, cos, sin, self.heads, self.eps, shape[1]
            )
            return mixed
        q, k = operations.rotate_heads(
            qkv, layer.q_norm, layer.k_norm, cos, sin, self.heads, self.eps
        )
        v = qkv[:, self.heads + k.shape[1] :]
        q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return attended.transpose(1, 2).reshape(len(qkv), -1)
