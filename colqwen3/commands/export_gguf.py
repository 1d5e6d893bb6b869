"""Write a model folder, original or quantized, as GGUF files for stock llama.cpp, with a program that runs them.

Weights of 3, 4 and 8 bits are copied without another rounding (as Q4_0 and Q8_0); an original
becomes float16. The folder gets text.gguf, mmproj.gguf and run_gguf.py.
"""

import argparse
from pathlib import Path

from colqwen3.checkpoint.hub import find_model
from colqwen3.commands.embed import visual_tokens
from colqwen3.system.errors import UserError
from colqwen3.system.files import fresh_folder, publish_folder

EXAMPLE = "colqwen3 export-gguf artifacts/checkpoints/w4g128 --out gguf/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("model", metavar="DIR_OR_HUB_ID")
    parser.add_argument("--revision", help="commit of a Hub id")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="a new folder")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16",
        help="of the matrices that are not quantized (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-num-visual-tokens", type=visual_tokens, default=1280, metavar="N",
        help="run_gguf.py shrinks a page until it has at most this many (default: %(default)s)",
    )  # fmt: skip


def execute(args: argparse.Namespace) -> None:
    """Write the files.

    Raises
    ------
    UserError
        If the output folder is in use, or the model cannot be read or written as GGUF.
    """
    from colqwen3.gguf.export import export_gguf

    out: Path = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; give --out a new one")
    source = find_model(args.model, args.revision)
    partial = fresh_folder(out)
    export_gguf(source, partial, args.dtype, args.max_num_visual_tokens)
    publish_folder(partial, out)
    for path in sorted(out.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")
