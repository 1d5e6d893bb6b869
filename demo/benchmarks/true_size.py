"""Writes a ColQwen3 of any size with random weights: for benchmarks and tests at true size.

Names and shapes are those of the real checkpoint, values are not: it finds nothing. Weights have
what makes quantization of real ones awkward: channels of unequal scale and a few outlier input
channels; a forward stays finite and its hidden states near one. Tokenizer and processor are those
of the embedded demo model, so that pages and queries can really be embedded.

Files are written piece by piece: no more than a few million values are held at a time.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint import layout
from colqwen3.checkpoint.headers import INDEX
from colqwen3.checkpoint.layout import Shape
from colqwen3.system.disk import check_space
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import fresh_folder, publish_folder, read_json, write_json
from colqwen3.system.progress import track

DEMO = Path("demo/model")
HEAD = "vlm.lm_head.weight"
PIECE = 1 << 22  # values made at a time by one thread
VALUE_BYTES = 2  # bfloat16
ROW_SPREAD = 0.3  # sigma of the log-normal scale of an output channel
OUTLIER_SHARE, OUTLIER_GAIN = 1 / 1024, 8.0  # input channels of larger weights
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
PROCESSOR_SIZES = ("patch_size", "spatial_merge_size", "temporal_patch_size")

Config = dict[str, Any]

PRESETS: dict[str, Config] = {
    "4b": {  # TomoroAI/tomoro-colqwen3-embed-4b
        "embed_dim": 320,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 262144,
            "rope_scaling": {
                "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
            },
        },
        "vision_config": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "8b": {  # TomoroAI/tomoro-colqwen3-embed-8b, whose backbone is Qwen3-VL-8B
        "embed_dim": 320,
        "text_config": {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 262144,
            "rope_scaling": {
                "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
            },
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}  # fmt: skip


def preset_config(preset: str) -> Config:
    """Return the whole config of a preset: the demo's, with its sizes replaced."""
    sizes, config = PRESETS[preset], read_json(DEMO / "config.json", "restore it from Git")
    sections = {
        key: {**config[key], **value} if isinstance(value, dict) else value
        for key, value in sizes.items()
    }
    return {**config, **sections}


def with_demo_tokens(config: Config, path: Path) -> Config:
    """Return `config` with the token ids of the demo's tokenizer; `path` is for the error.

    Raises
    ------
    UserError
        If the demo's tokenizer and processor cannot serve a model of this config.
    """
    demo = read_json(DEMO / "config.json", "restore it from Git")
    try:
        text, vision = config["text_config"], config["vision_config"]
        minimum = demo["text_config"]["vocab_size"]
        if text["vocab_size"] < minimum:
            raise UserError(
                f"{path}: text_config.vocab_size is {text['vocab_size']}; the demo's tokenizer "
                f"needs at least {minimum}"
            )
        for key in PROCESSOR_SIZES:
            if vision[key] != demo["vision_config"][key]:
                raise UserError(
                    f"{path}: vision_config.{key} is {vision[key]}; the demo's processor makes "
                    f"{demo['vision_config'][key]}"
                )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is no ColQwen3 config (lacks {error}); correct it") from None
    result = {**config, **{key: demo[key] for key in TOKEN_IDS}, "dtype": "bfloat16"}
    result["text_config"] = {**text, "eos_token_id": demo["text_config"]["eos_token_id"]}
    result.pop("auto_map", None)
    return result


def shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return every tensor to write, name -> shape; an untied head is stored as the 8B stores it."""
    result = layout.tensors(config)
    text = config["text_config"]
    if not text.get("tie_word_embeddings", True):
        result[HEAD] = (text["vocab_size"], text["hidden_size"])
    return result


def plan_shards(tensors: Mapping[str, Shape], limit: int) -> list[dict[str, Shape]]:
    """Deal tensors out to shards of at most `limit` bytes, in order; a larger one goes alone."""
    shards: list[dict[str, Shape]] = []
    filled = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * VALUE_BYTES
        if not shards or filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def deviation(name: str, shape: Shape, config: Mapping[str, Any]) -> float:
    """Return the standard deviation of a tensor's values.

    A linear keeps the variance of its input (fan_in^-0.5); those that write into the residual
    stream are smaller by sqrt(2 layers), so that the stream stays near one at any depth (Radford
    et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3).
    """
    if len(shape) == 1:
        return 0.1 if is_norm(name) else 0.02
    if ".embed_tokens." in name or ".pos_embed." in name or name == HEAD:
        return 0.03
    base = 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        return base / math.sqrt(2 * config["text_config"]["num_hidden_layers"])
    if ".blocks." in name and name.endswith((".attn.proj.weight", ".linear_fc2.weight")):
        return base / math.sqrt(2 * config["vision_config"]["depth"])
    return base


def is_norm(name: str) -> bool:
    """Whether a tensor is the weight of a normalisation, whose values lie around one."""
    return name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))


def generator(seed: int, *what: object) -> torch.Generator:
    """Return a random generator of its own for each thing made from one seed."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def outlier_gains(name: str, columns: int, seed: int) -> torch.Tensor:
    """Return the gain [columns] of each input channel of a linear: one, and a few large ones."""
    gains = torch.ones(columns)
    count = max(1, round(columns * OUTLIER_SHARE))
    gains[torch.randperm(columns, generator=generator(seed, name))[:count]] = OUTLIER_GAIN
    return gains


def make_rows(
    name: str, shape: Shape, rows: range, config: Mapping[str, Any], seed: int
) -> torch.Tensor:
    """Return some rows of a tensor, bfloat16 [rows, values of a row].

    They depend on the seed, the name and the first row alone, never on the number of threads.
    """
    columns = math.prod(shape[1:])
    random = generator(seed, name, rows.start)
    values = torch.empty(len(rows), columns).normal_(generator=random)
    values *= deviation(name, shape, config)
    if len(shape) > 1:
        spread = torch.empty(len(rows), 1).normal_(generator=random) * ROW_SPREAD
        values *= torch.exp(spread - ROW_SPREAD**2)  # mean square one
    if name.startswith(layout.BLOCKS) and len(shape) == 2:  # a linear
        values *= outlier_gains(name, columns, seed)
    if is_norm(name):
        values += 1
    return values.bfloat16()


def header(tensors: Mapping[str, Shape]) -> tuple[bytes, dict[str, int]]:
    """Return the start of a safetensors file of bfloat16 tensors, and where each tensor begins.

    The format is that of the safetensors library; its JSON is padded so that data begins at a
    multiple of eight bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name, shape in tensors.items():
        begins[name], end = end, end + math.prod(shape) * VALUE_BYTES
        entries[name] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [begins[name], end],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + begin for name, begin in begins.items()}


def write_shard(
    path: Path, tensors: Mapping[str, Shape], config: Mapping[str, Any], seed: int, threads: int
) -> None:
    """Write one safetensors file, `threads` pieces at a time, each to its own place."""
    start, begins = header(tensors)
    with path.open("wb") as file, ThreadPoolExecutor(threads) as pool:
        file.write(start)
        file.flush()

        def write(piece: tuple[str, range]) -> None:
            name, rows = piece
            values = make_rows(name, tensors[name], rows, config, seed)
            offset = begins[name] + rows.start * values.shape[1] * VALUE_BYTES
            write_at(file.fileno(), values.view(torch.uint8).numpy().data.cast("B"), offset)

        for _ in pool.map(write, pieces(tensors)):
            pass


def pieces(tensors: Mapping[str, Shape]) -> Iterator[tuple[str, range]]:
    """Yield the rows of every tensor in pieces of at most `PIECE` values, one row at least."""
    for name, shape in tensors.items():
        step = max(1, PIECE // math.prod(shape[1:]))
        for first in range(0, shape[0], step):
            yield name, range(first, min(first + step, shape[0]))


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at a place of a file: the system may take less at a time."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def make_checkpoint(
    config: Config, folder: Path, shard_bytes: int, seed: int, threads: int | None = None
) -> None:
    """Write a whole model folder, by rename when it is done.

    Raises
    ------
    UserError
        If `folder` is not empty, or the disk has not enough room.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; remove it or name another --out")
    tensors = shapes(config)
    total = sum(math.prod(shape) for shape in tensors.values()) * VALUE_BYTES
    check_space(folder, total, "the checkpoint")
    partial = fresh_folder(folder)
    shards = plan_shards(tensors, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in track(zip(names, shards, strict=True), "shards", len(shards)):
        write_shard(partial / name, shard, config, seed, threads or os.cpu_count() or 1)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for path in sorted(DEMO.glob("*.json")):
        if path.name not in ("config.json", INDEX):
            shutil.copyfile(path, partial / path.name)
    write_json(partial / "config.json", config)
    (partial / "README.md").write_text(
        f"Random weights of true shapes (demo/true_size.py, seed {seed}): for measuring time, "
        "memory and size. It finds nothing.\n",
        encoding="utf-8",
    )
    publish_folder(partial, folder)


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.benchmarks.true_size", description=__doc__
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", choices=PRESETS, help="the sizes of a published model")
    which.add_argument("--config", type=Path, metavar="FILE", help="a config.json of any sizes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="gigabytes a file (10^9 bytes)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.preset:
        config = preset_config(args.preset)
    else:
        config = with_demo_tokens(read_json(args.config, "give a config.json"), args.config)
    torch.set_num_threads(1)  # the pieces are what runs in parallel
    try:
        make_checkpoint(config, args.out, int(args.shard_gb * 1e9), args.seed)
    except (KeyError, ValueError) as error:
        raise UserError(f"{args.config}: has a wrong size ({error}); correct it") from None


if __name__ == "__main__":
    run(main)
