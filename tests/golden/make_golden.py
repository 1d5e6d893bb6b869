r"""Build the golden checkpoint, its inputs and its reference embeddings.

The golden set is an oracle for ColQwen3 that shares no code with the package under test. It runs
on transformers 4.57.6, the line the published model code was written for; the package runs on
5.x, whose Qwen3-VL modelling, rope configuration and image processors were rewritten since.

    python -m venv golden-venv
    golden-venv/bin/pip install transformers==4.57.6 torch==2.13.0 pillow==13.0.0 \
        safetensors==0.8.0 tokenizers==0.22.2
    golden-venv/bin/python tests/golden/make_golden.py
    golden-venv/bin/python tests/golden/sensitivity.py

torchvision must be absent or unused: pages go through the Pillow-based image processor, whose
pixels equal those of the Pillow back end of 5.x for images that are RGB already. For images with
transparency they do not: 4.57.6 drops the alpha channel (`Image.convert("RGB")`), 5.x blends with
white. The published model runs on 4.57.6, so dropping it is what the golden set asks for.

What is written, all of it determined by `SEED`:

- `model/`: a checkpoint in the published layout (bfloat16 shards with an index). Its shape is
  unlike that of the published model, and no norm, bias or merger is near its neutral value, so
  that leaving any of them out moves the embeddings.
- `inputs/queries.json` and `inputs/pages/*.png`.
- `golden.safetensors`: float32 embeddings `query/<id>` and `page/<stem>`, computed in float32 from
  the stored weights, each item on its own and so without padding. Pages of more than
  `STORE_ALL_UP_TO` tokens keep every `ROW_STEP`-th token and the last `LAST_ROWS`.
- `golden_meta.json`: versions; for every item the run-length encoded input ids, the grid, and
  the token indices behind the stored rows (`rows`; null means all); the MaxSim scores over *all*
  tokens, one row a query and one column a page, in the order of `queries` and `pages`.
"""

from __future__ import annotations

import itertools
import json
import platform
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy
import PIL
import safetensors
import tokenizers
import torch
import transformers
from draw_pages import PAGES, draw_page
from golden_tokenizer import ADDED_TOKENS, build_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel

SEED = 20261123
TRANSFORMERS_VERSION = "4.57.6"

GOLDEN_DIR = Path(__file__).resolve().parent
MODEL_DIR = GOLDEN_DIR / "model"
PAGES_DIR = GOLDEN_DIR / "inputs" / "pages"
QUERIES_PATH = GOLDEN_DIR / "inputs" / "queries.json"

EMBED_DIM = 48
MAX_VISUAL_TOKENS = 1280
PIXELS_PER_TOKEN = 32 * 32
MIN_PIXELS = 65536
AUGMENTATION = "<|endoftext|>" * 10
PROMPT_TOKENS = 11

STORE_ALL_UP_TO = 512
ROW_STEP = 7
LAST_ROWS = 12

QUERIES = {
    "blank": " \t\n",
    "short": "  Q3?\n",
    "question": "Which region shows the highest growth of energy imports?",
    "unicode": "Gro\u0308ße & cafe\u0301: 売上高は何円ですか? ½ ≤ №7 🙂 Ωмега ",
    "long": (
        "The table on the second page lists costs, margins and shares for each unit. "
        "Given those figures, and the forecast that figure 3 plots against the measured values "
        "on a logarithmic axis, explain in which quarter of which year the annual net revenue of "
        "the smallest unit first exceeded 1,234.56 million, how the index was computed, and what "
        "the author leaves out: taxes, exchange rates (EUR/USD 1.0875), or both?"
    ),
}

AUTO_MAP = {
    "AutoConfig": "configuration_colqwen3.ColQwen3Config",
    "AutoModel": "modeling_colqwen3.ColQwen3",
    "AutoProcessor": "processing_colqwen3.ColQwen3Processor",
}


class ColQwen3Config(Qwen3VLConfig):
    """Qwen3-VL configuration with the fields of the projection."""

    model_type = "colqwen3"

    def __init__(self, embed_dim: int = 320, padding_side: str = "left", **kwargs: Any) -> None:
        """Take the fields of Qwen3-VL as `kwargs`."""
        super().__init__(**kwargs)
        self.embed_dim = embed_dim
        self.padding_side = padding_side


class ColQwen3(Qwen3VLPreTrainedModel):
    """Qwen3-VL with a linear projection of every token to a unit vector."""

    config_class = ColQwen3Config
    _tied_weights_keys: ClassVar[list[str]] = ["vlm.lm_head.weight"]

    def __init__(self, config: ColQwen3Config) -> None:
        """Build the model with initial weights."""
        super().__init__(config)
        self.vlm = Qwen3VLForConditionalGeneration(config)
        self.embedding_proj_layer = nn.Linear(config.text_config.hidden_size, config.embed_dim)
        self.post_init()

    def forward(self, attention_mask: Tensor, **inputs: Any) -> Tensor:
        """Return one unit vector a token, and zeros for padding."""
        hidden = self.vlm.model(attention_mask=attention_mask, use_cache=False, **inputs)[0]
        projected = self.embedding_proj_layer(hidden.to(self.embedding_proj_layer.weight.dtype))
        norm = projected.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(projected.dtype).eps)
        return projected / norm * attention_mask.unsqueeze(-1)


@dataclass(frozen=True)
class Item:
    """Model inputs of one query or page."""

    input_ids: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None


def build_config(tokenizer: Qwen2TokenizerFast) -> ColQwen3Config:
    """Return the configuration of the golden checkpoint."""
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in ADDED_TOKENS}
    config = ColQwen3Config(
        embed_dim=EMBED_DIM,
        padding_side="left",
        # The published outer flag contradicts the text flag; the text flag is the one that counts.
        tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config={
            # Larger than the tokenizer, as in the published model.
            "vocab_size": 448,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 262144,
            "rope_theta": 5_000_000,
            # With 16 frequencies [6, 5, 5] is a plain round robin, which any section that is too
            # long gives as well; and only the first few frequencies turn by a visible angle over
            # a page. This uneven split shows a wrong section and swapped axes.
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [13, 1, 2],
                "rope_type": "default",
            },
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 36,
            "intermediate_size": 72,
            "num_heads": 3,
            "out_hidden_size": 128,
            "deepstack_visual_indexes": [0, 1, 3],
            "num_position_embeddings": 144,
        },
    )
    config.auto_map = AUTO_MAP
    return config


def _random_weight(name: str, parameter: Tensor) -> Tensor:
    """Return the random weight of one parameter; it depends on the name, not on the order."""
    generator = torch.Generator().manual_seed(SEED ^ zlib.crc32(name.encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("bias"):
        return noise * (0.5 if name.startswith("embedding_proj_layer") else 0.3)
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        # Above one on average: sharp attention is what makes positions matter.
        return 1.7 * torch.exp(0.4 * noise)
    if name.endswith("language_model.norm.weight"):
        return torch.exp(0.6 * noise)
    if parameter.ndim == 1:
        return torch.exp(0.3 * noise)
    if "embed_tokens" in name or "pos_embed" in name:
        return 0.7 * noise
    return noise * parameter[0].numel() ** -0.5


def write_checkpoint(tokenizer: Qwen2TokenizerFast) -> None:
    """Write weights, configuration, tokenizer and processor files to `MODEL_DIR`."""
    shutil.rmtree(MODEL_DIR, ignore_errors=True)
    model = ColQwen3(build_config(tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_weight(name, parameter))
    model.to(torch.bfloat16).save_pretrained(MODEL_DIR, max_shard_size="800KB")

    processor_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    tokenizer.init_kwargs["auto_map"] = processor_map
    tokenizer.init_kwargs["processor_class"] = "ColQwen3Processor"
    tokenizer.save_pretrained(MODEL_DIR)

    # The video processor of this version needs torchvision, and the published image processor
    # file names the torchvision class: both files are written as data, not through their classes.
    common = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "ColQwen3Processor",
        "auto_map": processor_map,
    }
    cap = MAX_VISUAL_TOKENS * PIXELS_PER_TOKEN
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {
            "size": {"longest_edge": cap, "shortest_edge": MIN_PIXELS},
            **common,
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
            **common,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
        "processor_config.json": {
            "auto_map": processor_map,
            "processor_class": "ColQwen3Processor",
        },
    }
    for name, content in files.items():
        (MODEL_DIR / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_inputs() -> None:
    """Write the queries and draw the pages."""
    shutil.rmtree(PAGES_DIR, ignore_errors=True)
    PAGES_DIR.mkdir(parents=True)
    text = json.dumps(QUERIES, indent=2, ensure_ascii=False) + "\n"
    QUERIES_PATH.write_text(text, encoding="utf-8")
    for stem in PAGES:
        draw_page(stem, SEED).save(PAGES_DIR / f"{stem}.png", optimize=True)


def load_reference() -> ColQwen3:
    """Load the stored weights into a float32 model, refusing missing or unknown tensors."""
    config = ColQwen3Config.from_pretrained(MODEL_DIR)
    # Otherwise the two halves are built in the stored dtype whatever the default dtype is.
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32
    model = ColQwen3(config).eval()
    stored = {
        name: tensor.float()
        for shard in sorted(MODEL_DIR.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }
    result = model.load_state_dict(stored, strict=False)
    if result.unexpected_keys or result.missing_keys != ["vlm.lm_head.weight"]:
        raise ValueError(f"checkpoint does not fit the model: {result}")
    return model


def build_image_processor(**overrides: Any) -> Qwen2VLImageProcessor:
    """Return the Pillow-based image processor with the published settings."""
    settings: dict[str, Any] = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        # This version silently ignores `size`; only these two names take effect.
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_VISUAL_TOKENS * PIXELS_PER_TOKEN,
    }
    return Qwen2VLImageProcessor(**(settings | overrides))


def query_item(tokenizer: Qwen2TokenizerFast, text: str) -> Item:
    """Prepare a query: stripped text and ten augmentation tokens, all attended to."""
    encoded = tokenizer(text.strip() + AUGMENTATION, return_tensors="pt")
    return Item(encoded["input_ids"])


def page_item(
    tokenizer: Qwen2TokenizerFast, processor: Qwen2VLImageProcessor, image: Image.Image
) -> Item:
    """Prepare a page: the fixed prompt around one placeholder a visual token."""
    pixels = processor(images=[image], return_tensors="pt")
    visual_tokens = int(pixels["image_grid_thw"].prod()) // processor.merge_size**2
    prompt = (
        "<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * visual_tokens
        + "<|vision_end|>Describe the image.<|im_end|><|endoftext|>"
    )
    input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if visual_tokens > MAX_VISUAL_TOKENS or input_ids.shape[1] != visual_tokens + PROMPT_TOKENS:
        raise ValueError(f"{input_ids.shape[1]} tokens for {visual_tokens} visual ones")
    return Item(input_ids, pixels["pixel_values"], pixels["image_grid_thw"])


def load_items(
    tokenizer: Qwen2TokenizerFast, processor: Qwen2VLImageProcessor
) -> tuple[dict[str, Item], dict[str, Item]]:
    """Return the stored queries and pages as model inputs."""
    texts = json.loads(QUERIES_PATH.read_text(encoding="utf-8"))
    queries = {key: query_item(tokenizer, text) for key, text in texts.items()}
    pages = {}
    for stem in PAGES:
        with Image.open(PAGES_DIR / f"{stem}.png") as image:
            pages[stem] = page_item(tokenizer, processor, image)
    return queries, pages


@torch.no_grad()
def embed(model: ColQwen3, item: Item, position_ids: Tensor | None = None) -> Tensor:
    """Return the embeddings of one item as a [tokens, embed_dim] tensor."""
    embeddings = model(
        input_ids=item.input_ids,
        attention_mask=torch.ones_like(item.input_ids),
        pixel_values=item.pixel_values,
        image_grid_thw=item.image_grid_thw,
        position_ids=position_ids,
    )
    return embeddings[0]


def maxsim(query: Tensor, page: Tensor) -> float:
    """Return the sum over query tokens of the best similarity with a page token."""
    return float((query @ page.T).max(dim=1).values.sum())


def kept_rows(tokens: int) -> list[int] | None:
    """Return the token indices to store, or None for all of them."""
    if tokens <= STORE_ALL_UP_TO:
        return None
    return sorted({*range(0, tokens, ROW_STEP), *range(tokens - LAST_ROWS, tokens)})


def describe(item: Item) -> dict[str, Any]:
    """Return what the metadata file says about an item."""
    ids = item.input_ids[0].tolist()
    grid = item.image_grid_thw
    return {
        "tokens": len(ids),
        "input_ids_runs": [[token, len(list(run))] for token, run in itertools.groupby(ids)],
        "image_grid_thw": None if grid is None else grid.tolist(),
        "rows": kept_rows(len(ids)),
    }


def write_golden() -> None:
    """Compute the reference embeddings and write them with their metadata."""
    tokenizer = Qwen2TokenizerFast.from_pretrained(MODEL_DIR)
    model = load_reference()
    queries, pages = load_items(tokenizer, build_image_processor())
    query_embeddings = {key: embed(model, item) for key, item in queries.items()}
    page_embeddings = {stem: embed(model, item) for stem, item in pages.items()}

    golden = {f"query/{key}": value for key, value in query_embeddings.items()}
    for stem, value in page_embeddings.items():
        rows = kept_rows(len(value))
        golden[f"page/{stem}"] = value if rows is None else value[rows]
    save_file(golden, GOLDEN_DIR / "golden.safetensors")

    meta = {
        "seed": SEED,
        "versions": {
            "python": platform.python_version(),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "pillow": PIL.__version__,
            "numpy": numpy.__version__,
        },
        "max_num_visual_tokens": MAX_VISUAL_TOKENS,
        "queries": {key: describe(item) for key, item in queries.items()},
        "pages": {stem: describe(item) for stem, item in pages.items()},
        "scores": [
            [maxsim(query, page) for page in page_embeddings.values()]
            for query in query_embeddings.values()
        ],
    }
    text = json.dumps(meta, ensure_ascii=False) + "\n"
    (GOLDEN_DIR / "golden_meta.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the whole golden set."""
    if transformers.__version__ != TRANSFORMERS_VERSION:
        raise SystemExit(f"run this under transformers {TRANSFORMERS_VERSION}")
    write_checkpoint(build_tokenizer())
    write_inputs()
    write_golden()


if __name__ == "__main__":
    main()
