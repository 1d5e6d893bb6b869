"""A model folder as colpali-engine's own ColQwen3 class loads it.

That class (colpali-engine 0.3.18) is Qwen3-VL with ``custom_text_proj`` beside ``language_model``
and ``visual``. Of a folder with other names it loads nothing and computes with random weights;
vectors have 320 numbers, whatever the config says.
"""

import shutil
from pathlib import Path
from typing import Any

from colqwen3.checkpoint.headers import SINGLE, Checkpoint
from colqwen3.checkpoint.layout import EMBEDDINGS_KEY, WIDTH_KEYS, vector_width
from colqwen3.checkpoint.quantization import check_packing
from colqwen3.checkpoint.tensor_file import TensorFile
from colqwen3.model.loading import quantization_config
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json, write_json

WIDTH = 320
PREFIXES = {"vlm.model.": "", "embedding_proj_layer.": "custom_text_proj."}
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
FIX = "give a complete model folder"


def colpali_name(name: str) -> str:
    """Return colpali-engine's name of a tensor or module of this published name."""
    for prefix, replacement in PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def export_colpali(source: Path, target: Path) -> None:
    """Write a model folder, original or quantized here, as colpali-engine loads it.

    Parameters
    ----------
    source
        Published, quantized (``auto_round``) or released in that format.
    target
        An empty folder.

    Raises
    ------
    UserError
        If the folder is damaged, in another format, or its vectors do not have 320 numbers.
    """
    quantization = quantization_config(source)
    config: dict[str, Any] = read_json(source / "config.json", FIX)
    try:
        width = vector_width(config)
        if quantization is not None:
            check_packing(quantization)
    except (KeyError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{source / 'config.json'}: {reason}; give an original or a folder of format auto_round"
        ) from None
    if EMBEDDINGS_KEY in config:
        raise UserError(
            f"{source}: has quantized token embeddings, which colpali-engine cannot read; take a "
            "recipe with token_embeddings: 16"
        )
    if width != WIDTH:
        raise UserError(
            f"{source / 'config.json'}: vectors have {width} numbers; colpali-engine's ColQwen3 has "
            f"{WIDTH}, fixed in its code: use transformers or sentence-transformers"
        )
    tensors = Checkpoint.read(source).tensors
    for name in ("embedding_proj_layer.weight", "embedding_proj_layer.bias"):
        if name not in tensors:
            raise UserError(f"{source}: lacks the tensor {name}; fetch it again")
    specs = {colpali_name(name): (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with TensorFile(target / SINGLE, specs) as file:
        for name, tensor in tensors.items():
            file.copy(colpali_name(name), source, tensor)
    dropped = {*WIDTH_KEYS, "auto_map", "padding_side"}
    config = {key: value for key, value in config.items() if key not in dropped}
    config |= {"model_type": "qwen3_vl", "architectures": ["ColQwen3"]}
    if quantization is not None:
        blocks = str(quantization["block_name_to_quantize"]).split(",")
        names = ",".join(colpali_name(block) for block in blocks)
        own = {
            colpali_name(name): value
            for name, value in quantization.get("extra_config", {}).items()
        }
        config["quantization_config"] = {
            **quantization,
            "block_name_to_quantize": names,
            **({"extra_config": own} if own else {}),
        }
    write_json(target / "config.json", config)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
