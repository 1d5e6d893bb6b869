"""Builds the parts of the serving runtime from the tensors of a model folder, one by one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import BLOCKS
from colqwen3.checkpoint.packing import PACKED_TENSORS, dequantize
from colqwen3.checkpoint.tensor_file import read_tensor
from colqwen3.model.configuration_colqwen3 import ColQwen3Config
from colqwen3.serving.decoder import Decoder, DecoderLayer
from colqwen3.serving.linears import KERNELS, Linear, Parts, choose_kernel, dense
from colqwen3.serving.vision import Merger, Norm, Tower, VisionBlock
from colqwen3.system.errors import UserError
from colqwen3.system.progress import track

TEXT = BLOCKS.removesuffix(".layers")
VISION = "vlm.model.visual"


class Weights:
    """The tensors of a model folder, moved to a device as they are needed.

    Parameters
    ----------
    folder
        Original or quantized.
    device, dtype
        Where to, and as what.
    quantization
        The ``quantization_config``; None for an original.

    Attributes
    ----------
    kernel
        What computes the quantized linears, one of `KERNELS`; ``dense`` for an original.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        quantization: dict[str, Any] | None,
    ) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self._quantization = quantization
        self._stored = Checkpoint.read(folder).tensors
        self.kernel = "dense"
        if quantization is not None:
            first = self._packed([f"{BLOCKS}.0.self_attn.o_proj"])
            self.kernel = choose_kernel(first, *self._format, dtype)

    @property
    def _format(self) -> tuple[int, int]:
        assert self._quantization is not None
        return self._quantization["bits"], self._quantization["group_size"]

    def _read(self, name: str) -> torch.Tensor:
        """Return one tensor as it is stored.

        Raises
        ------
        UserError
            If it is missing or holds NaN or infinite values.
        """
        if name not in self._stored:
            raise UserError(f"{self._folder}: lacks the tensor {name}; fetch it again")
        tensor = read_tensor(self._folder, self._stored[name]).to(self._device)
        if not all(map(torch.isfinite, tensor.aminmax())):
            raise UserError(f"{self._folder}: {name} holds NaN or infinite weights")
        return tensor

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor that is not quantized."""
        return self._read(name).to(self._dtype)

    def norm(self, name: str) -> Norm:
        """Return weight and bias of a layer norm."""
        return Norm(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def linear(self, name: str) -> Linear:
        """Return a linear with a bias, which is dense: only an experiment quantizes such."""
        if f"{name}.qweight" in self._stored:
            packed = self._packed([name])
            weight = dequantize(**packed, bits=self._format[0]).to(self._dtype)
        else:
            weight = self.tensor(f"{name}.weight").flatten(1)
        return dense(weight, self.tensor(f"{name}.bias"))

    def merged(self, *names: str) -> Linear:
        """Return linears of the decoder that read the same input as one, outputs in a row."""
        if f"{names[0]}.weight" in self._stored:
            return dense(torch.cat([self.tensor(f"{name}.weight") for name in names]))
        return KERNELS[self.kernel](self._packed(names), *self._format, self._dtype)

    def _packed(self, names: Sequence[str]) -> Parts:
        return {
            part: torch.cat([self._read(f"{name}.{part}") for name in names], 1)
            for part in PACKED_TENSORS
        }


def build_decoder(weights: Weights, config: ColQwen3Config) -> Decoder:
    """Build the decoder and projection; linears come one layer at a time."""
    text = config.text_config
    count = text.num_hidden_layers

    def layer(index: int) -> DecoderLayer:
        at = f"{BLOCKS}.{index}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        return DecoderLayer(
            input_norm=weights.tensor(f"{at}.input_layernorm.weight"),
            qkv=weights.merged(*(f"{attention}.{part}_proj" for part in "qkv")),
            q_norm=weights.tensor(f"{attention}.q_norm.weight"),
            k_norm=weights.tensor(f"{attention}.k_norm.weight"),
            o=weights.merged(f"{attention}.o_proj"),
            post_attention_norm=weights.tensor(f"{at}.post_attention_layernorm.weight"),
            gate_up=weights.merged(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=weights.merged(f"{mlp}.down_proj"),
        )

    return Decoder(
        layers=[layer(index) for index in track(range(count), "layers", count)],
        norm=weights.tensor(f"{TEXT}.norm.weight"),
        projection=weights.linear("embedding_proj_layer"),
        heads=text.num_attention_heads,
        head_dim=text.head_dim,
        eps=text.rms_norm_eps,
    )


def build_tower(weights: Weights, config: ColQwen3Config) -> Tower:
    """Build the vision tower."""
    vision = config.vision_config

    def block(index: int) -> VisionBlock:
        at = f"{VISION}.blocks.{index}"
        return VisionBlock(
            norm1=weights.norm(f"{at}.norm1"),
            qkv=weights.linear(f"{at}.attn.qkv"),
            proj=weights.linear(f"{at}.attn.proj"),
            norm2=weights.norm(f"{at}.norm2"),
            fc1=weights.linear(f"{at}.mlp.linear_fc1"),
            fc2=weights.linear(f"{at}.mlp.linear_fc2"),
        )

    def merger(at: str, whole: bool) -> Merger:
        fc1, fc2 = weights.linear(f"{at}.linear_fc1"), weights.linear(f"{at}.linear_fc2")
        return Merger(weights.norm(f"{at}.norm"), fc1, fc2, whole)

    return Tower(
        patch_embed=weights.linear(f"{VISION}.patch_embed.proj"),
        position_embed=weights.tensor(f"{VISION}.pos_embed.weight"),
        rotary=Qwen3VLVisionRotaryEmbedding(vision),
        blocks=[block(index) for index in range(vision.depth)],
        merger=merger(f"{VISION}.merger", whole=False),
        deepstack={
            place: merger(f"{VISION}.deepstack_merger_list.{number}", whole=True)
            for number, place in enumerate(vision.deepstack_visual_indexes)
        },
        heads=vision.num_heads,
        merge=vision.spatial_merge_size,
    )
