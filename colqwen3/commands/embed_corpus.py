"""Embed the pages of a whole collection into Parquet shards, as fast as the GPU can.

Inputs are folders, patterns, files and lists (.jsonl or .parquet with path, page, id). A run that
is killed continues with the missing shards; a page that cannot be read goes to _errors.jsonl. With
several GPUs: accelerate launch --multi_gpu --num_processes N -m colqwen3 embed-corpus ...
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from colqwen3.commands.embed import add_activations, add_model_options, positive
from colqwen3.system.errors import UserError

if TYPE_CHECKING:
    from colqwen3.corpus.job import Part

EXAMPLE = "colqwen3 embed-corpus --model DIR scans/ 'reports/**/*.pdf' --out vectors/"
FORMATS = (
    "float32", "float16", "int8", "binary",
    "pool2-float16", "pool3-float16", "pool2-int8", "pool3-int8",
)  # fmt: skip
LARGEST_SHARD = 4096  # pages, which are held in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="folder, pattern, image, PDF, or list of them"
    )
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", required=True)
    parser.add_argument("--revision", help="commit of a Hub id")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True)
    parser.add_argument(
        "--format", choices=FORMATS, default="float16",
        help="of the vectors (default: %(default)s)",
    )  # fmt: skip
    add_model_options(parser, dtype=None)
    add_activations(parser)
    parser.add_argument(
        "--visual-tokens-per-batch", type=positive, metavar="N",
        help="bound of a batch of pages (default: 5120 on a GPU, 1280 on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--pages-per-shard", type=shard_size, default=64, metavar="N",
        help="pages of one file (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=whole, metavar="N",
        help="processes that prepare pages (default: every core but one on a GPU, 0 on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=("process", "ray"), default="process",
        help="ray: a Ray cluster, or this machine if RAY_ADDRESS is not set (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--actors", type=positive, metavar="N",
        help="embedding actors of Ray, one GPU each (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true", help="end at the first page that cannot be embedded"
    )


def whole(text: str) -> int:
    """Return a whole number from 0 to 256.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is anything else.
    """
    if not text.isdecimal() or int(text) > 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 256")
    return int(text)


def shard_size(text: str) -> int:
    """Return a number of pages per shard.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is not a whole number from 1 to 4096.
    """
    if positive(text) > LARGEST_SHARD:
        raise argparse.ArgumentTypeError(f"{text} is more than {LARGEST_SHARD}")
    return int(text)


def execute(args: argparse.Namespace) -> None:
    """Embed the collection.

    Raises
    ------
    UserError
        If an input or the model cannot be read, or pages could not be embedded.
    """
    if args.out.is_file():
        args.parser.error("--out must name a folder")
    if args.actors and args.engine != "ray":
        args.parser.error(
            "--actors is for --engine ray; accelerate launch uses several GPUs without"
        )
    from colqwen3.checkpoint.hub import find_model
    from colqwen3.corpus.job import CorpusOptions, embed_corpus, plan_corpus
    from colqwen3.corpus.sources import find_sources
    from colqwen3.system.device import choose_device

    options = CorpusOptions(
        format=args.format,
        dtype=args.dtype,
        device=args.device,
        max_num_visual_tokens=args.max_num_visual_tokens,
        visual_tokens_per_batch=args.visual_tokens_per_batch,
        pages_per_shard=args.pages_per_shard,
        workers=args.workers,
        strict=args.strict,
        trust_remote_code=args.trust_remote_code,
        activations=args.activations,
    )
    model = find_model(args.model, args.revision, args.trust_remote_code)
    pages = find_sources(args.inputs)
    if args.engine == "ray":
        from colqwen3.corpus.ray_engine import embed_with_ray, start_ray

        device = start_ray(args.device)
        plan = plan_corpus(model, pages, args.out, options, device)
        embed_with_ray(plan, device, args.actors or 1)
    else:
        part = find_part()
        device = choose_device(args.device, part.local_rank)
        embed_corpus(plan_corpus(model, pages, args.out, options, device), device, part)


def find_part() -> "Part":
    """Return which of the processes of ``accelerate launch`` this is.

    Raises
    ------
    UserError
        If a launcher started several processes without saying which this is.
    """
    from colqwen3.corpus.job import Part

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "WORLD_SIZE" not in os.environ:
        return Part()
    try:
        rank, ranks, local, locals_ = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        raise UserError(
            f"{', '.join(names)}: are not all set to numbers; start with `accelerate launch`"
        ) from None
    return Part(rank, ranks, local, locals_)
