"""ColQwen3: a Qwen3-VL backbone and a projection, one L2-normalised vector per token.

The computation follows the model's published description: last hidden state after the final
norm, projection with bias, L2 normalisation, zeros on padding. The backbone is transformers'
own Qwen3-VL (M-RoPE, deepstack, causal attention).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLPreTrainedModel
from transformers.utils import ModelOutput

from .configuration_colqwen3 import ColQwen3Config

# as in colqwen3/checkpoint/layout.py, which this module cannot import: it travels with checkpoints
LEGACY_KEY_MAPPING = {
    r"^model\.language_model\.": "vlm.model.language_model.",
    r"^model\.visual\.": "vlm.model.visual.",
    r"^language_model\.": "vlm.model.language_model.",
    r"^visual\.": "vlm.model.visual.",
    r"^custom_text_proj\.": "embedding_proj_layer.",
    r"^embedding_proj_layer\.before_weight\.bias$": "embedding_proj_layer.bias",
}
UNUSED_KEYS = r"^(vlm\.)?lm_head\.|^embedding_proj_layer\.guard_weight$"

# transformers 4.57 locates the image tokens itself
TAKES_TOKEN_TYPES = "mm_token_type_ids" in inspect.signature(Qwen3VLModel.forward).parameters


@dataclass
class ColQwen3Output(ModelOutput):  # type: ignore[misc]
    """What `ColQwen3.forward` returns.

    Attributes
    ----------
    embeddings
        Float tensor [batch, tokens, embed_dim]: unit vectors, exact zeros on padding.
    """

    embeddings: torch.Tensor | None = None


def _is_auto_round(config: Any) -> bool:
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = vars(quantization)
    return quantization.get("quant_method") in ("auto-round", "intel/auto-round")


def dequantize_rows(packed: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return rows of a packed table as float32.

    Parameters
    ----------
    packed
        Int32 [..., width * bits / 32]: codes plus ``2 ** (bits - 1)``, lowest bits first.
    scales
        Float [..., groups].
    bits
        Bits of one weight; they divide 32.

    Returns
    -------
    torch.Tensor
        [..., width].
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    groups = (codes - 2 ** (bits - 1)).flatten(-2).unflatten(-1, (scales.shape[-1], -1))
    rows: torch.Tensor = groups.float() * scales.float().unsqueeze(-1)
    return rows.flatten(-2)


class QuantizedEmbedding(nn.Module):
    """Token embeddings in 4 or 8 bits, of which a forward dequantizes the rows that it reads.

    Parameters
    ----------
    rows, width
        Of the table.
    bits
        Bits of one weight, 4 or 8.
    group_size
        Weights of a row that share one scale.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, rows: int, width: int, bits: int, group_size: int) -> None:
        super().__init__()
        if bits not in (4, 8) or group_size < 1 or width % group_size:
            raise ValueError(f"token embeddings in {bits} bits, groups of {group_size}")
        self.bits, self.dtype = bits, torch.get_default_dtype()
        packed = torch.empty(rows, width * bits // 32, dtype=torch.int32)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.empty(rows, width // group_size))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move the table; a cast only changes the dtype of what it returns."""
        scales = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if not scales.is_meta:
            self.weight_scale = scales.to(self.weight_packed.device)
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., width] of token ids [...]."""
        rows = self.weight_packed[input_ids], self.weight_scale[input_ids]
        return dequantize_rows(*rows, self.bits).to(self.dtype)


class Backbone(nn.Module):
    """Holds the Qwen3-VL model under the published name ``vlm.model``, without its unused head."""

    def __init__(self, config: ColQwen3Config) -> None:
        super().__init__()
        self.model = Qwen3VLModel(config)


class ColQwen3(Qwen3VLPreTrainedModel):  # type: ignore[misc]
    """The ColQwen3 retriever: token ids and pixels in, one vector per token out."""

    config_class = ColQwen3Config
    config: ColQwen3Config
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [UNUSED_KEYS]

    def __init__(self, config: ColQwen3Config) -> None:
        super().__init__(config)
        self.vlm = Backbone(config)
        self.embedding_proj_layer = nn.Linear(config.text_config.hidden_size, config.embed_dim)
        if (quantized := getattr(config, "quantized_token_embeddings", None)) is not None:
            text = config.text_config
            self.set_input_embeddings(
                QuantizedEmbedding(text.vocab_size, text.hidden_size, **quantized)
            )
        self.post_init()
        if quantized is not None:
            # its float16 scales, which transformers would squeeze through bfloat16
            self._keep_in_fp32_modules_strict = {"embed_tokens"}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast the model, but keep the frequencies of its positions in full precision.

        In float16 they move a token by 0.0003 in cosine.
        """
        frequencies = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and not buffer.is_meta
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in frequencies:
            setattr(module, name, buffer.to(getattr(module, name).device))
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings."""
        embeddings: nn.Module = self.vlm.model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.vlm.model.set_input_embeddings(value)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but reject a checkpoint that lacks weights: none are invented.

        Published and legacy key names are accepted; a stored language-model head is ignored.
        On a CPU a checkpoint of auto-round computes in float32 unless another ``dtype`` is asked
        for: its kernel would be forced to float16, and bfloat16 moves a token by 0.0006 in cosine.

        Raises
        ------
        ValueError
            If a tensor is missing, has another shape, or is unknown.
        """
        with_info = kwargs.pop("output_loading_info", False)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        kwargs.setdefault("key_mapping", LEGACY_KEY_MAPPING)
        # transformers 4.57 would squeeze float16 scales through the config's bfloat16
        on_cpu = kwargs.get("device_map") in (None, "cpu")
        squeezes = on_cpu and not TAKES_TOKEN_TYPES and _is_auto_round(kwargs.get("config"))
        if dtype is None and squeezes:
            kwargs["dtype"] = torch.float32
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if names := sorted(map(str, info.get(problem) or ())):
                raise ValueError(
                    f"checkpoint has {problem.replace('_', ' ')}, the first is {names[0]}"
                )
        # otherwise save_pretrained would write legacy names, undoing a renaming that never took place
        model._weight_conversions = None
        if (
            dtype in (None, torch.float32)
            and _is_auto_round(model.config)
            and model.device.type == "cpu"
        ):
            nn.Module.float(model)  # transformers' own rejects quantized models
        return (model, info) if with_info else model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ColQwen3Output | tuple[torch.Tensor]:
        """Embed a batch of queries or pages.

        Parameters
        ----------
        input_ids, attention_mask
            Integer tensors [batch, tokens], left-padded.
        pixel_values
            Float tensor [patches, channels x temporal patch x patch x patch], all pages in a row.
        image_grid_thw
            Integer tensor [pages, 3]: frames, patch rows and patch columns of each page.
        mm_token_type_ids
            Integer tensor [batch, tokens]: 1 on image tokens; computed when absent.
        position_ids
            Integer tensor [3, batch, tokens]; computed when absent.
        return_dict
            False returns a plain tuple.
        use_cache
            Ignored: a retriever never continues a sequence.
        **kwargs
            Passed to the backbone.

        Returns
        -------
        ColQwen3Output
            Its ``embeddings`` are [batch, tokens, embed_dim].
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if image_grid_thw is None:
            if position_ids is None:
                # counted from the first real token, as M-RoPE does for pages: padding moves nothing
                position_ids = (
                    (attention_mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, *input_ids.shape)
                )
        elif TAKES_TOKEN_TYPES:
            if mm_token_type_ids is None:
                mm_token_type_ids = (input_ids == self.config.image_token_id).int()
            kwargs["mm_token_type_ids"] = mm_token_type_ids
        hidden = self.vlm.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            position_ids=position_ids,
            use_cache=False,
            **kwargs,
        )[0]
        projection = self.embedding_proj_layer
        embeddings = projection(hidden.to(projection.weight.dtype))
        norms = embeddings.norm(dim=-1, keepdim=True)
        embeddings = embeddings / norms.clamp(min=torch.finfo(embeddings.dtype).eps)
        embeddings = embeddings * attention_mask.unsqueeze(-1)
        return (embeddings,) if return_dict is False else ColQwen3Output(embeddings=embeddings)
