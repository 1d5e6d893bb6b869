"""Writing a ColQwen3 folder, original or quantized, as GGUF files for stock llama.cpp.

One tensor is in memory at a time, a large one in parts. Codes and scales of a quantized checkpoint
are copied, not rounded again.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import EMBEDDINGS, all_linears, tensors, vector_width
from colqwen3.checkpoint.packing import PACKED_TENSORS
from colqwen3.checkpoint.quantization import (
    PACKED_TABLE,
    check_bits,
    check_packing,
    embeddings_bits,
    linear_bits,
)
from colqwen3.checkpoint.tensor_file import DTYPES, read_chunks, read_rows, read_tensor
from colqwen3.gguf.blocks import to_blocks, unpack_codes
from colqwen3.gguf.layout import (
    TEXT,
    TWO_BITS,
    VISION_FILE,
    GgufTensor,
    find_unsupported,
    gguf_files,
    rope_parameters,
    tensor_bytes,
)
from colqwen3.gguf.tokenizer import MODEL, SPLITTING, Vocabulary, read_vocabulary
from colqwen3.model.loading import quantization_config
from colqwen3.model.modeling_colqwen3 import dequantize_rows
from colqwen3.system.disk import check_space
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json

logger = logging.getLogger(__name__)

FIX = "fetch the folder again"
DENSE = {"float16": "F16", "float32": "F32"}
"""Names on the command line -> types of GGUF."""
TORCH = {"F16": torch.float16, "F32": torch.float32}
RUNNER = Path(__file__).with_name("run_gguf.py")
TABLE_ROWS = 4096
"""Rows of quantized token embeddings in memory at a time."""
HEADERS = 64 << 20
"""More than metadata and vocabulary of a model take on disk."""
MIN_PIXELS = 4096
"""What transformers' image processor enlarges a page to where preprocessor_config.json is silent."""


def export_gguf(
    source: Path, folder: Path, dense: str = "float16", max_num_visual_tokens: int = 1280
) -> None:
    """Write text.gguf, mmproj.gguf and the program that runs them.

    Parameters
    ----------
    source
        A model folder: an original, or a checkpoint in ``auto_round`` format of 3, 4 or 8 bits.
    folder
        Where the files go; exists.
    dense
        Type of the matrices that are not quantized: ``float16`` or ``float32``.
    max_num_visual_tokens
        The limit of a page that the program keeps to.

    Raises
    ------
    UserError
        If the folder is damaged, the package ``gguf`` is missing, or the files cannot hold the
        model exactly.
    """
    model = read_model(source, DENSE[dense])
    vocabulary = read_vocabulary(source, model.config["text_config"]["vocab_size"])
    images = read_image_settings(source, model.config, max_num_visual_tokens)
    check_space(folder, tensor_bytes(model.files) + HEADERS, "the GGUF files")
    for name, write_metadata in (
        (TEXT, lambda writer: _write_text_metadata(writer, model.config, vocabulary)),
        (VISION_FILE, lambda writer: _write_vision_metadata(writer, model.config, images)),
    ):
        _write_file(folder / name, model, write_metadata)
    shutil.copyfile(RUNNER, folder / RUNNER.name)


@dataclass(frozen=True)
class Model:
    """A folder that can be written, and what will be written."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    packed: dict[str, int]
    """Bits of each quantized module."""
    files: dict[str, list[GgufTensor]]


def read_model(source: Path, dense: str) -> Model:
    """Read config and headers of a folder, and reject what GGUF files cannot hold exactly.

    Parameters
    ----------
    source
        The model folder.
    dense
        ``F16`` or ``F32``.

    Raises
    ------
    UserError
        Naming the file and the key.
    """
    quantization, config = quantization_config(source), read_json(source / "config.json", FIX)
    if quantization is not None:
        try:
            check_packing(quantization)
        except ValueError as error:
            raise UserError(f"{source / 'config.json'}: {error}") from None
    try:
        expected, problem = tensors(config), find_unsupported(config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{source / 'config.json'}: lacks a size or has a wrong one ({error}); "
            "give the model's own config"
        ) from None
    if problem:
        raise UserError(f"{source / 'config.json'}: {problem}; it cannot be written as GGUF")
    checkpoint = Checkpoint.read(source)
    packed = _packed_modules(source, config, checkpoint)
    for name, shape in expected.items():
        _check_tensor(checkpoint, name, shape, packed)
    if 3 in packed.values():
        logger.warning(
            "3-bit weights are written exactly, but as Q4_0: no smaller than those of 4 bits"
        )
    return Model(checkpoint, config, packed, gguf_files(config, packed, dense))


def _packed_modules(source: Path, config: dict[str, Any], checkpoint: Checkpoint) -> dict[str, int]:
    """Return the bits of each quantized module of a checkpoint."""
    quantization = config.get("quantization_config")
    linears = [name for name in all_linears(config) if f"{name}.qweight" in checkpoint.tensors]
    if linears and quantization is None:
        raise UserError(f"{source / 'config.json'}: lacks quantization_config; {FIX}")
    packed = {name: linear_bits(quantization or {}, name) for name in linears}
    if 2 in packed.values():
        raise UserError(f"{source}: has 2-bit weights; {TWO_BITS}")
    try:
        check_bits(quantization or {}, checkpoint.tensors)
        bits = embeddings_bits(config, checkpoint.tensors)
    except ValueError as error:
        raise UserError(f"{source / 'config.json'}: {error}; {FIX}") from None
    return {**packed, **({EMBEDDINGS: bits} if bits < 16 else {})}


def _check_tensor(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], packed: dict[str, int]
) -> None:
    """Reject a tensor that is missing or of another shape or type than the config says."""
    module = name.removesuffix(".weight")
    expected: dict[str, tuple[int, ...]] = {name: shape}
    if module == EMBEDDINGS and module in packed:
        return  # `embeddings_bits` has looked at it
    if module in packed:
        bits = packed[module]
        scales = checkpoint.tensors.get(f"{module}.scales")
        groups = scales.shape[0] if scales is not None else 1
        expected = {
            f"{module}.qweight": (shape[1] * bits // 32, shape[0]),
            f"{module}.qzeros": (groups, shape[0] * bits // 32),
            f"{module}.scales": (groups, shape[0]),
        }
    for part, size in expected.items():
        tensor = checkpoint.tensors.get(part)
        if tensor is None:
            raise UserError(f"{checkpoint.folder}: lacks the tensor {part}; {FIX}")
        if tensor.shape != size or tensor.dtype not in DTYPES:
            raise UserError(
                f"{checkpoint.folder / tensor.file}: {part} is {tensor.dtype} {list(tensor.shape)}, "
                f"config.json gives {list(size)}; {FIX}"
            )


def read_image_settings(
    source: Path, config: dict[str, Any], max_num_visual_tokens: int
) -> dict[str, Any]:
    """Return how a page becomes pixels: ``mean``, ``std``, ``min_pixels`` and ``max_pixels``.

    Raises
    ------
    UserError
        If preprocessor_config.json is damaged, or asks for what the program does not do.
    """
    path = source / "preprocessor_config.json"
    stored, vision = read_json(path, FIX), config["vision_config"]
    side = vision["patch_size"] * vision["spatial_merge_size"]
    # what transformers' image processor does by default
    expected = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
    }
    for key, value in expected.items():
        if stored.get(key, value) != value:
            raise UserError(f"{path}: {key} is {stored[key]!r}, the GGUF runner uses {value!r}")
    size = stored.get("size") or {}
    max_pixels = max_num_visual_tokens * side * side
    return {
        "mean": [float(value) for value in stored["image_mean"]],
        "std": [float(value) for value in stored["image_std"]],
        "min_pixels": min(int(size.get("shortest_edge", MIN_PIXELS)), max_pixels),
        "max_pixels": max_pixels,
    }


class _Streamed:
    """What `GGUFWriter` takes for an array: it asks its size, and then to write itself."""

    def __init__(self, tensor: GgufTensor, model: Model) -> None:
        self.nbytes = tensor.nbytes
        self._parts = _convert(tensor, model)

    def tofile(self, file: IO[bytes]) -> None:
        """Write all parts."""
        for part in self._parts:
            file.write(part.contiguous().view(torch.uint8).numpy().data.cast("B"))


def _convert(tensor: GgufTensor, model: Model) -> Iterator[torch.Tensor]:
    """Yield the contents of a GGUF tensor, some megabytes at a time.

    Raises
    ------
    UserError
        If the type of the GGUF tensor cannot hold a weight.
    """
    checkpoint = model.checkpoint
    module = tensor.source.removesuffix(".weight")
    if tensor.kind not in TORCH and module == EMBEDDINGS:
        yield from _convert_table(tensor, model)
        return
    if tensor.kind not in TORCH:
        bits = model.packed[module]
        parts = {
            part: read_tensor(checkpoint.folder, checkpoint.tensors[f"{module}.{part}"])
            for part in PACKED_TENSORS
        }
        try:
            codes = unpack_codes(parts, bits)
        except ValueError as error:
            raise UserError(f"{checkpoint.folder}: {module} {error}; quantize again") from None
        yield to_blocks(codes, parts["scales"], tensor.kind)
        return
    stored = checkpoint.tensors[tensor.source]
    if tensor.frame is not None:
        whole = read_tensor(checkpoint.folder, stored)
        chunks: Iterator[torch.Tensor] = iter([whole[:, :, tensor.frame].contiguous()])
    else:
        chunks = (
            torch.frombuffer(bytearray(chunk), dtype=DTYPES[stored.dtype])
            for chunk in read_chunks(checkpoint.folder, stored)
        )
    for chunk in chunks:
        converted = chunk.to(TORCH[tensor.kind])
        if not bool(converted.isfinite().all()):
            finite = bool(chunk.isfinite().all())
            problem = "holds weights beyond float16" if finite else "holds NaN or infinite weights"
            remedy = "export with --dtype float32" if finite else FIX
            raise UserError(
                f"{checkpoint.folder / stored.file}: {tensor.source} {problem}; {remedy}"
            )
        yield converted


def _convert_table(tensor: GgufTensor, model: Model) -> Iterator[torch.Tensor]:
    """Yield quantized token embeddings as blocks, some rows at a time."""
    folder, bits = model.checkpoint.folder, model.packed[EMBEDDINGS]
    packed, scale = (model.checkpoint.tensors[f"{EMBEDDINGS}.{part}"] for part in PACKED_TABLE)
    for first in range(0, packed.shape[0], TABLE_ROWS):
        count = min(TABLE_ROWS, packed.shape[0] - first)
        scales = read_rows(folder, scale, first, count)
        if not bool(scales.isfinite().all()):
            raise UserError(f"{folder}: {EMBEDDINGS} has a scale that is NaN or infinite; {FIX}")
        steps = dequantize_rows(
            read_rows(folder, packed, first, count), torch.ones_like(scales), bits
        )
        yield to_blocks(steps.to(torch.int8), scales.T, tensor.kind)


def _write_file(path: Path, model: Model, write_metadata: Any) -> None:
    """Write one GGUF file."""
    gguf = import_gguf()
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it announces every file
    arch = "qwen3vl" if path.name == TEXT else "clip"
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer)
    planned = model.files[path.name]
    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in planned:
        writer.write_tensor_data(_Streamed(tensor, model), gguf.GGUFEndian.LITTLE)
    writer.close()


def import_gguf() -> Any:
    """Return the package ``gguf``, llama.cpp's own reader and writer of its files.

    Raises
    ------
    UserError
        If it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf is missing; run `pip install gguf==0.19.0`") from None
    return gguf


def _write_text_metadata(writer: Any, config: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Write the hyperparameters of the language model, and its tokenizer."""
    gguf = import_gguf()
    text, rope = config["text_config"], rope_parameters(config)
    head_dim = text.get("head_dim", 128)
    heads = text["num_attention_heads"]
    writer.add_name("ColQwen3")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.get("num_key_value_heads", 32) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(text.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(rope.get("rope_theta", 500000.0))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_num_deepstack_layers(len(config["vision_config"]["deepstack_visual_indexes"]))
    writer.add_pooling_type(gguf.PoolingType.NONE)
    writer.add_tokenizer_model(MODEL)
    writer.add_tokenizer_pre(SPLITTING)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.end is not None:
        writer.add_eos_token_id(vocabulary.end)
    writer.add_pad_token_id(vocabulary.padding)
    # llama.cpp's own default for this kind of vocabulary is id 11
    writer.add_bos_token_id(vocabulary.padding)
    writer.add_add_bos_token(False)


def _write_vision_metadata(writer: Any, config: dict[str, Any], images: dict[str, Any]) -> None:
    """Write the hyperparameters of the vision tower, and how the runner prepares pages."""
    gguf = import_gguf()
    vision = config["vision_config"]
    side = round(vision["num_position_embeddings"] ** 0.5)
    deepstack = vision["deepstack_visual_indexes"]
    writer.add_name("ColQwen3")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(side * vision["patch_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_projection_dim(vision["out_hidden_size"])
    writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean(images["mean"])
    writer.add_vision_image_std(images["std"])
    writer.add_vision_is_deepstack_layers([i in deepstack for i in range(vision["depth"])])
    writer.add_uint32("colqwen3.embed_dim", vector_width(config))
    writer.add_uint32("colqwen3.min_pixels", images["min_pixels"])
    writer.add_uint32("colqwen3.max_pixels", images["max_pixels"])
    writer.add_uint32("colqwen3.side", vision["patch_size"] * vision["spatial_merge_size"])
