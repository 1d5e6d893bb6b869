"""Write a model folder, original or quantized, as the library colpali_engine loads it into its own class.

Weights are copied, only their names change. That class has vectors of 320 numbers; models with
others are rejected.
"""

import argparse
from pathlib import Path

from colqwen3.checkpoint.hub import find_model
from colqwen3.system.errors import UserError
from colqwen3.system.files import fresh_folder, publish_folder

EXAMPLE = "colqwen3 export-colpali artifacts/release/w4g128 --out colpali/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("model", metavar="DIR_OR_HUB_ID")
    parser.add_argument("--revision", help="commit of a Hub id")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="a new folder")


def execute(args: argparse.Namespace) -> None:
    """Write the folder.

    Raises
    ------
    UserError
        If the output folder is in use, or colpali-engine has no class for the model.
    """
    from colqwen3.release.colpali import export_colpali

    out: Path = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; give --out a new one")
    source = find_model(args.model, args.revision)
    partial = fresh_folder(out)
    export_colpali(source, partial)
    publish_folder(partial, out)
    for path in sorted(out.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")
