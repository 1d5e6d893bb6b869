"""Builds the parts of the serving runtime from the tensors of a model folder, one by one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import BLOCKS, EMBEDDINGS
from colqwen3.checkpoint.packing import PACKED_TENSORS, dequantize, reorder_outputs
from colqwen3.checkpoint.quantization import (
    PACKED_TABLE,
    check_bits,
    embeddings_bits,
    linear_bits,
)
from colqwen3.checkpoint.tensor_file import read_tensor
from colqwen3.model.configuration_colqwen3 import ColQwen3Config
from colqwen3.serving.decoder import Decoder, DecoderLayer
from colqwen3.serving.gate_features import alternating
from colqwen3.serving.int8 import quantize_weight, rotate
from colqwen3.serving.linears import (
    BYTE,
    OWN_TILES,
    DecoderLinear,
    Embeddings,
    GateSums,
    Linear,
    Parts,
    build,
    choose_kernel,
    dense,
    dense_embeddings,
    dequantized_on_use,
    humming_or_int8,
    packed_embeddings,
    packed_in_int8,
    side_by_side,
    streams_int8,
    with_int8_weight,
)
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
    config
        Its config.json.
    int8
        Whether the decoder's linears shall take inputs in 8 bits too.

    Attributes
    ----------
    quantization
        The ``quantization_config``; None for an original.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        config: dict[str, Any],
        int8: bool = False,
    ) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self.quantization = config.get("quantization_config")
        self._stored = Checkpoint.read(folder).tensors
        self._embeddings_bits = embeddings_bits(config, self._stored)
        self._int8 = int8
        self._kernels: dict[tuple[int, torch.Size, bool], str] = {}  # bits, size, gate -> name
        self._gate_sums = GateSums()
        if self.quantization is not None:
            check_bits(self.quantization, self._stored)

    @property
    def kernel(self) -> str:
        """Return the kernels of the linears that were read so far, ``dense`` without any."""
        return " and ".join(dict.fromkeys(self._kernels.values())) or "dense"

    @property
    def _group_size(self) -> int:
        assert self.quantization is not None
        return int(self.quantization["group_size"])

    def _bits(self, linear: str) -> int:
        assert self.quantization is not None
        return linear_bits(self.quantization, linear)

    def _kernel(self, bits: int, parts: Parts, gate: GateSums | None) -> str:
        """Return the kernel for linears of such bits and size, tried with the linear `parts`."""
        key = bits, parts["qweight"].shape, gate is not None
        if key not in self._kernels:
            self._kernels[key] = choose_kernel(parts, bits, self._group_size, self._dtype, gate)
        return self._kernels[key]

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

    def embeddings(self) -> Embeddings:
        """Return the token embeddings; quantized ones stay packed."""
        if self._embeddings_bits == 16:
            return dense_embeddings(self.tensor(f"{EMBEDDINGS}.weight"))
        packed, scales = (self._read(f"{EMBEDDINGS}.{part}") for part in PACKED_TABLE)
        return packed_embeddings(packed, scales, self._embeddings_bits, self._dtype)

    def linear(self, name: str) -> Linear:
        """Return a linear with a bias; one in 8 bits stays so in memory."""
        if f"{name}.qweight" not in self._stored:
            weight = self.tensor(f"{name}.weight").flatten(1)
        else:
            bits, packed = self._bits(name), self._packed([name])
            if bits == BYTE:
                return dequantized_on_use(packed, self.tensor(f"{name}.bias"), self._dtype)
            weight = dequantize(**packed, bits=bits).to(self._dtype)
        return dense(weight, self.tensor(f"{name}.bias"))

    def merged(self, *names: str, rotated: bool = False, gate: bool = False) -> DecoderLinear:
        """Return linears of the decoder that read the same input as one, outputs in a row.

        Inputs in 8 bits may be `rotated`, see `int8.rotate`. The outputs of two linears of a `gate`
        are as `fused.gate` takes them, or what it gives.
        """
        if f"{names[0]}.weight" in self._stored:
            weight = torch.cat([self.tensor(f"{name}.weight") for name in names])
            if gate:
                weight = weight[alternating(len(weight) // 2)]
            linear = dense(weight)
            if self._int8:
                whole = rotate(weight) if rotated else weight
                return with_int8_weight(linear, quantize_weight(whole), self._dtype)
            return linear
        widths = {self._bits(name) for name in names}
        if len(widths) > 1:  # no recipe makes this, another program may
            linears = [self.merged(name, rotated=rotated) for name in names]
            return side_by_side(linears, gate)
        (bits,), parts = widths, self._packed(names)
        if gate:
            order = alternating(parts["scales"].shape[1] // 2)
            parts = reorder_outputs(parts, order.to(self._device), bits)
        sums = self._gate_sums if gate else None
        kernel = self._kernel(bits, parts, sums)
        inputs = parts["qweight"].shape[0] * 32 // bits
        on_humming = kernel in ("humming", OWN_TILES)
        if self._int8 and on_humming and streams_int8(bits, inputs, self._group_size):
            return humming_or_int8(parts, self._group_size, rotated, kernel == OWN_TILES, sums)
        linear = build(kernel, parts, bits, self._group_size, self._dtype, sums)
        if self._int8:
            in_int8 = packed_in_int8(parts, bits, self._dtype, rotated)
            return with_int8_weight(linear, in_int8, self._dtype)
        return linear

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
            gate_up=weights.merged(f"{mlp}.gate_proj", f"{mlp}.up_proj", gate=True),
            down=weights.merged(f"{mlp}.down_proj", rotated=True),
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
