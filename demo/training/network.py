"""The demonstration ColQwen3: its shape, a batched forward pass, and its published layout.

The parameters live in the Qwen3-VL modules of transformers.  Training needs many small pages of
one size at once, for which those modules loop over images; the forward passes here compute the
same function on the same parameters as plain batched tensors.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLConfig, Qwen3VLModel
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from demo.training.tokenizer import PAD, PAGE_PREFIX, PAGE_SUFFIX, save_tokenizer

PATCH = 16
CELL = 32
COPIES = 6  # three colour channels times two temporal slices
MAX_CELLS = 1280
SHARDS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the text widths are multiples of 128 as 4-bit groups need."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    vision_hidden: int = 128
    vision_depth: int = 6
    vision_heads: int = 4
    deepstack: tuple[int, ...] = (1, 3)
    embed_dim: int = 128


def published_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of ``config.json`` with the fields the published model has."""
    token = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    return {
        "architectures": ["ColQwen3"],
        "dtype": "bfloat16",
        "embed_dim": shape.embed_dim,
        "image_token_id": token["image_pad"],
        "model_type": "colqwen3",
        "padding_side": "left",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": 0.02,
            "intermediate_size": shape.intermediate,
            "max_position_embeddings": 4096,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [12, 10, 10],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": shape.vocab,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.6",
        "video_token_id": token["video_pad"],
        "vision_config": {
            "deepstack_visual_indexes": list(shape.deepstack),
            "depth": shape.vision_depth,
            "dtype": "bfloat16",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": shape.vision_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4 * shape.vision_hidden,
            "model_type": "qwen3_vl",
            "num_heads": shape.vision_heads,
            "num_position_embeddings": 2304,
            "out_hidden_size": shape.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
    }


def transformers_config(published: dict[str, Any]) -> Qwen3VLConfig:
    """Return the Qwen3-VL configuration transformers 5 builds the same model from."""
    text = {**published["text_config"], "dtype": "float32"}
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen3VLConfig(
        text_config=text,
        vision_config={**published["vision_config"], "dtype": "float32"},
        **{name: published[name] for name in names},
    )


def turn(x: Tensor) -> Tensor:
    """Return the second half of the last axis, negated, before the first half."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Vlm(nn.Module):
    """Holds the Qwen3-VL body so that parameters carry the published names."""

    def __init__(self, config: Qwen3VLConfig) -> None:
        super().__init__()
        self.model = Qwen3VLModel(config)


class Retriever(nn.Module):
    """Qwen3-VL body and projection, with batched forward passes for training.

    Parameters
    ----------
    published : dict
        Contents of ``config.json``.
    tokenizer : Tokenizer
        Gives the ids of the page prompt and of the padding token.
    """

    def __init__(self, published: dict[str, Any], tokenizer: Tokenizer) -> None:
        super().__init__()
        self.published = published
        self.vlm = Vlm(transformers_config(published))
        hidden = published["text_config"]["hidden_size"]
        self.embedding_proj_layer = nn.Linear(hidden, published["embed_dim"], bias=True)
        self.prefix = tokenizer.encode(PAGE_PREFIX).ids
        self.suffix = tokenizer.encode(PAGE_SUFFIX).ids
        self.pad = tokenizer.token_to_id(PAD)
        for name, ids in (("prefix_ids", self.prefix), ("suffix_ids", self.suffix)):
            self.register_buffer(name, torch.tensor(ids), persistent=False)
        self._grids: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def _grid(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return what depends only on the patch grid: position taps and rotary tables."""
        if (rows, columns) not in self._grids:
            # Angles need all digits, whatever precision the layers run in.
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                self._grids[rows, columns] = self._tables(rows, columns, device)
        return self._grids[rows, columns]

    def _tables(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        visual, text = self.vlm.model.visual, self.vlm.model.language_model
        thw = torch.tensor([[1, rows, columns]], device=device)
        taps, weights = get_vision_interpolation_indices_and_weights(
            thw,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=2,
        )
        empty = torch.zeros(1, device=device)
        cos, sin = visual.rotary_pos_emb(empty, get_vision_position_ids(thw, 2))
        ids = torch.tensor(
            [
                [
                    *self.prefix,
                    *[self.published["image_token_id"]] * (rows * columns // 4),
                    *self.suffix,
                ]
            ],
            device=device,
        )
        kinds = (ids == self.published["image_token_id"]).int()
        # Annotated for the legacy tensor classes; any integer tensor serves.
        rope_index: Any = self.vlm.model.get_rope_index
        positions, _ = rope_index(ids, kinds, image_grid_thw=thw)
        text_cos, text_sin = text.rotary_emb(empty, positions)
        return taps, weights, cos, sin, text_cos, text_sin

    def vision(self, pixels: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Run the vision tower.

        Parameters
        ----------
        pixels : Tensor
            Grey pages ``[batch, height, width]`` in [-1, 1], sides multiples of 32.

        Returns
        -------
        tuple
            Merged cells ``[batch, cells, hidden]``, the deepstack features of the same shape, and
            the last block's patches ``[batch, patches, vision_hidden]`` in 2 x 2 block order.
        """
        visual = self.vlm.model.visual
        batch, height, width = pixels.shape
        taps, weights, cos, sin, _, _ = self._grid(height // PATCH, width // PATCH, pixels.device)
        blocks = pixels.view(batch, height // CELL, 2, PATCH, width // CELL, 2, PATCH)
        patches = blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, -1, PATCH * PATCH)
        # A grey still page repeats the same patch in every channel and temporal slice.
        kernel = visual.patch_embed.proj.weight.sum(dim=(1, 2)).flatten(1)
        state = functional.linear(patches, kernel, visual.patch_embed.proj.bias)
        state = state + (visual.pos_embed(taps) * weights[:, :, None]).sum(1)
        deep: list[Tensor] = []
        for index, block in enumerate(visual.blocks):
            normed = block.norm1(state)
            heads = block.attn.qkv(normed).view(
                batch, -1, 3, block.attn.num_heads, block.attn.head_dim
            )
            query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
            query = query * cos + turn(query) * sin
            key = key * cos + turn(key) * sin
            mixed = functional.scaled_dot_product_attention(query, key, value)
            state = state + block.attn.proj(mixed.transpose(1, 2).flatten(2))
            state = state + block.mlp(block.norm2(state))
            if index in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[len(deep)]
                deep.append(merger(state).view(batch, -1, visual.config.out_hidden_size))
        cells = visual.merger(state).view(batch, -1, visual.config.out_hidden_size)
        return cells, deep, state

    def _text(self, state: Tensor, cos: Tensor, sin: Tensor, deep: list[Tensor]) -> Tensor:
        """Run the text tower on ``[batch, seq, hidden]`` and return unit embeddings.

        Attention is causal, so padding on the right changes nothing on its left.
        """
        text = self.vlm.model.language_model
        begin = len(self.prefix)
        for index, layer in enumerate(text.layers):
            state = layer(state, position_embeddings=(cos, sin), attention_mask=None)
            if index < len(deep):
                state = state + functional.pad(deep[index], (0, 0, begin, len(self.suffix)))
        projected = self.embedding_proj_layer(text.norm(state))
        return functional.normalize(projected, dim=-1)

    def pages(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embed grey pages ``[batch, height, width]`` in [-1, 1].

        Returns
        -------
        tuple
            Unit embeddings ``[batch, 11 + cells, embed_dim]`` (the prompt's tokens around the
            cells) and the vision tower's last patches, for the reading loss.
        """
        batch, height, width = pixels.shape
        cells, deep, patches = self.vision(pixels)
        embed = self.vlm.model.language_model.embed_tokens
        prefix, suffix = embed(self.prefix_ids), embed(self.suffix_ids)
        around = [part.expand(batch, -1, -1) for part in (prefix, suffix)]
        state = torch.cat([around[0], cells, around[1]], dim=1)
        cos, sin = self._grid(height // PATCH, width // PATCH, pixels.device)[4:]
        return self._text(state, cos, sin, deep), patches

    def queries(self, ids: Tensor) -> Tensor:
        """Embed queries ``[batch, seq]`` padded on the right: ``[batch, seq, embed_dim]``."""
        text = self.vlm.model.language_model
        state = text.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        cos, sin = text.rotary_emb(state, positions)
        return self._text(state, cos, sin, [])


def _neighbour_bias(head_dim: int, step: tuple[int, int], strength: float) -> tuple[Tensor, Tensor]:
    """Return query and key biases that make a head look at one neighbouring patch.

    With the axial rotary embedding the product of two constant vectors depends only on where the
    patches lie; turning the key's vector by a step moves the maximum to that neighbour.
    """
    quarter = head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter) / quarter)
    # The three highest frequencies tell neighbours apart and do not repeat within a page.
    size = torch.zeros(quarter)
    size[:3] = (strength * head_dim**0.5) ** 0.5
    query = torch.cat([size, size, torch.zeros(2 * quarter)])
    angle = torch.cat([frequencies * step[0], frequencies * step[1]])
    pair = torch.cat([size, size])
    key = torch.cat([pair * torch.cos(angle), -pair * torch.sin(angle)])
    return query, key


def spelled_embeddings(tokenizer: Tokenizer, width: int, generator: torch.Generator) -> Tensor:
    """Return token embeddings ``[vocab, width]`` in which alike spelling means alike vectors.

    Each vector sums random vectors of the token's letters, pairs and triples of letters, without
    case, and a little of its own.  So a rare token begins near the common ones it looks like, and
    what is learned for one holds for the others.
    """
    features: dict[str, Tensor] = {}
    rows = []
    for index in range(tokenizer.get_vocab_size()):
        row = 0.5 * torch.randn(width, generator=generator)
        text = tokenizer.decode([index]).lower().replace(" ", "")
        for length in (1, 2, 3):
            for begin in range(len(text) - length + 1):
                part = text[begin : begin + length]
                if part not in features:
                    features[part] = torch.randn(width, generator=generator)
                row = row + features[part]
        rows.append(row)
    unit: Tensor = functional.normalize(torch.stack(rows), dim=-1)
    scaled: Tensor = unit * (0.3 * math.sqrt(width))
    return scaled


def initialise(
    model: Retriever, tokenizer: Tokenizer, components: Tensor | None, seed: int
) -> None:
    """Set the starting weights.

    Parameters
    ----------
    model : Retriever
        The model, changed in place.
    tokenizer : Tokenizer
        Spells the tokens for their embeddings.
    components : Tensor, optional
        Orthonormal patch filters ``[vision_hidden, 256]`` from rendered text.
    seed : int
        Seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(weight: Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                out = name.endswith(("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2"))
                fill(module.weight, (0.3 if out else 1.0) * module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.zero_()
        embed = model.vlm.model.language_model.embed_tokens
        embed.weight.copy_(spelled_embeddings(tokenizer, embed.embedding_dim, generator))
        visual = model.vlm.model.visual
        proj = visual.patch_embed.proj
        kernel = torch.empty(proj.out_channels, PATCH * PATCH)
        if components is None:
            fill(kernel, 1 / PATCH)
        else:
            kernel.copy_(components)
        copies = kernel.view(-1, 1, 1, PATCH, PATCH).expand_as(proj.weight)
        proj.weight.copy_(copies / COPIES)
        proj.bias.zero_()
        near = [(0, -1), (0, 1), (-1, 0), (1, 0)]
        wide = [(0, -1), (0, 1), (0, -2), (0, 2)]
        width = visual.config.hidden_size
        for index, block in enumerate(visual.blocks):
            heads, dim = block.attn.num_heads, block.attn.head_dim
            block.attn.qkv.weight[: 2 * width] *= 0.3
            steps = wide if index % 2 else near
            for head in range(heads):
                query, key = _neighbour_bias(dim, steps[head % len(steps)], 6.0)
                block.attn.qkv.bias[head * dim : (head + 1) * dim] = query
                block.attn.qkv.bias[width + head * dim : width + (head + 1) * dim] = key


def save_published(model: Retriever, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder in the layout of the published checkpoint, in bfloat16 and two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in sorted(model.state_dict().items())
    }
    total = sum(value.numel() * 2 for value in tensors.values())
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, value in tensors.items():
        if filled >= total / SHARDS and len(shards) < SHARDS:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled += value.numel() * 2
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": PATCH,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": MAX_CELLS * CELL * CELL, "shortest_edge": 4 * CELL * CELL},
        "temporal_patch_size": 2,
    }
    files = {
        "config": model.published,
        "model.safetensors.index": {"metadata": {"total_size": total}, "weight_map": index},
        "preprocessor_config": processor,
        "processor_config": {"processor_class": "ColQwen3Processor"},
        "video_preprocessor_config": {
            **{key: value for key, value in processor.items() if key != "image_processor_type"},
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    save_tokenizer(tokenizer, folder)
