"""Embed queries and pages with any ColQwen3 folder, original or quantized.

The output has one tensor [tokens, embed_dim] per query (query/<_id>) and page
(page/<file stem>). A run that is interrupted continues where it stopped.
"""

import argparse
from pathlib import Path

EXAMPLE = (
    "colqwen3 embed --model DIR --queries queries.jsonl --pages scans/ --out vectors.safetensors"
)
DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("bfloat16", "int8")
OUTPUTS = ("float32", "float16", "bfloat16")
MINIMUM_VISUAL_TOKENS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", required=True)
    parser.add_argument("--revision", help="commit of a Hub id")
    parser.add_argument(
        "--queries", type=Path, metavar="FILE.jsonl", help='lines of {"_id": ..., "text": ...}'
    )
    parser.add_argument("--pages", type=Path, metavar="DIR", help="folder of page images or PDFs")
    parser.add_argument("--out", type=Path, metavar="FILE.safetensors", required=True)
    add_model_options(parser)
    parser.add_argument(
        "--output-dtype", choices=OUTPUTS, default="float32",
        help="of the vectors (default: %(default)s)",
    )  # fmt: skip
    add_activations(parser)
    parser.add_argument(
        "--visual-tokens-per-batch", type=positive, default=1280, metavar="N",
        help="bound of a batch of pages (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--queries-per-batch", type=positive, default=16, metavar="N",
        help="bound of a batch of queries (default: %(default)s)",
    )  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser, dtype: str | None = "float32") -> None:
    """Add the options that say how a model runs; without a default `dtype` the device decides."""
    usual = dtype or "bfloat16 on a GPU, float32 on a CPU"
    parser.add_argument(
        "--dtype", choices=DTYPES, default=dtype, help=f"of the arithmetic (default: {usual})"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: the GPU when there is one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-num-visual-tokens", type=visual_tokens, default=1280, metavar="N",
        help="a page is shrunk until it has at most this many (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="let Python files of the model's folder run (its tokenizer's)",
    )  # fmt: skip


def add_activations(parser: argparse.ArgumentParser) -> None:
    """Add the option that says what the decoder's linears take."""
    parser.add_argument(
        "--activations", choices=ACTIVATIONS,
        help="as the serving runtime computes, int8 from 65 tokens on; on a GPU with --dtype bfloat16 "
        "(default: those of --dtype)",
    )  # fmt: skip


def positive(text: str) -> int:
    """Return a whole number above 0.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def visual_tokens(text: str) -> int:
    """Return a number of visual tokens that a page can be shrunk to.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is anything else.
    """
    if positive(text) < MINIMUM_VISUAL_TOKENS:
        raise argparse.ArgumentTypeError(f"{text} is less than {MINIMUM_VISUAL_TOKENS}")
    return int(text)


def execute(args: argparse.Namespace) -> None:
    """Embed the given files.

    Raises
    ------
    UserError
        If an option does not fit, or the model or the data cannot be read.
    """
    if args.queries is None and args.pages is None:
        args.parser.error("give at least one of --queries and --pages")
    if args.out.suffix != ".safetensors" or args.out.is_dir():
        args.parser.error("--out must name a file that ends in .safetensors")
    from colqwen3.checkpoint.hub import find_model
    from colqwen3.dataset.beir import read_queries
    from colqwen3.dataset.pages import find_pages
    from colqwen3.embedding.job import EmbeddingOptions, embed_to_file
    from colqwen3.system.files import digest_files

    code = Path(__file__).parents[1]
    options = EmbeddingOptions(
        dtype=args.dtype,
        output=args.output_dtype,
        device=args.device,
        max_num_visual_tokens=args.max_num_visual_tokens,
        queries_per_batch=args.queries_per_batch,
        visual_tokens_per_batch=args.visual_tokens_per_batch,
        trust_remote_code=args.trust_remote_code,
        activations=args.activations,
    )
    embed_to_file(
        find_model(args.model, args.revision, args.trust_remote_code),
        read_queries(args.queries) if args.queries else {},
        find_pages(args.pages) if args.pages else {},
        args.out,
        args.out.with_name(args.out.name + ".parts"),
        options,
        digest_files(code, (*code.rglob("*.py"), *code.rglob("*.cu"))),
    )
