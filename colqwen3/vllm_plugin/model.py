"""vLLM's ColQwen3 with a bias in its projection, which must be in the checkpoint."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.colqwen3 import ColQwen3Model

WIDTH_KEYS = ("embed_dim", "vector_dim")
NEEDED = {"custom_text_proj.weight", "custom_text_proj.bias"}


class ColQwen3WithBias(ColQwen3Model):  # type: ignore[misc]
    """vLLM's class; only the projection differs."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        widths = {width for key in WIDTH_KEYS if (width := getattr(config, key, None)) is not None}
        if len(widths) != 1:
            raise ValueError("config.json: give the width of a token's vector once, as embed_dim")
        self.embed_dim: int = widths.pop()
        self.custom_text_proj = nn.Linear(
            config.text_config.hidden_size,
            self.embed_dim,
            bias=True,
            dtype=vllm_config.model_config.head_dtype,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load all tensors of a checkpoint.

        Parameters
        ----------
        weights
            Stored name -> tensor, in any order.

        Returns
        -------
        set
            Names of the parameters that were loaded.

        Raises
        ------
        ValueError
            If weight or bias of the projection is missing.
        """
        loaded: set[str] = super().load_weights(weights)
        for name in sorted(NEEDED - loaded):
            stored = name.replace("custom_text_proj", "embedding_proj_layer")
            raise ValueError(f"checkpoint lacks the tensor {stored}; fetch the model again")
        return loaded
