"""Serve a local page that searches a collection by original and 4-bit, side by side with heat maps.

The vectors are those of `colqwen3 embed-corpus`, of the same pages by both models. With --queries
the page lists those whose first page changed. It is served to this machine alone.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from colqwen3.system.errors import UserError

EXAMPLE = "colqwen3 search --original DIR vectors-16bit/ --quantized DIR vectors-4bit/"
ADDRESS = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    for name in ("original", "quantized"):
        parser.add_argument(
            f"--{name}", nargs=2, metavar=("MODEL", "VECTORS"), required=True,
            help=f"the {name} model, and the folder of its vectors",
        )  # fmt: skip
    parser.add_argument(
        "--queries", type=Path, metavar="FILE.jsonl", help='lines of {"_id": ..., "text": ...}'
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for queries")
    parser.add_argument("--port", type=int, default=8501, help="(default: %(default)s)")


def execute(args: argparse.Namespace) -> None:
    """Become Streamlit, which serves the page until it is interrupted.

    Raises
    ------
    UserError
        If Streamlit is not installed, or a folder of vectors or the list of queries is not there.
    """
    for _, vectors in (args.original, args.quantized):
        if not Path(vectors).is_dir():
            raise UserError(f"{vectors}: no such folder; run `colqwen3 embed-corpus` first")
    if args.queries is not None and not args.queries.is_file():
        raise UserError(f"{args.queries}: no such file; correct --queries")
    if find_spec("streamlit") is None:
        raise UserError("streamlit is not installed; run `pip install '.[search]'`")
    os.execv(sys.executable, command(args))


def command(args: argparse.Namespace) -> list[str]:
    """Return the command that serves the page."""
    options = {
        "server.address": ADDRESS,
        "server.port": args.port,
        "server.headless": "true",
        "browser.gatherUsageStats": "false",
        "global.developmentMode": "false",
        "client.toolbarMode": "minimal",
        "server.fileWatcherType": "none",
    }
    page = Path(__file__).parents[1] / "search/page.py"
    words = [sys.executable, "-m", "streamlit", "run", str(page)]
    words += [f"--{name}={value}" for name, value in options.items()]
    words += ["--", "--original", *args.original, "--quantized", *args.quantized]
    words += ["--device", args.device]
    words += ["--queries", str(args.queries)] if args.queries else []
    return words
