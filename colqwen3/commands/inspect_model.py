"""Print the contents of a model folder and the sizes that quantizing it will give, as JSON, from headers alone."""

import argparse
import json
import sys

from colqwen3.checkpoint.hub import find_model
from colqwen3.inspection import inspect_folder

EXAMPLE = "colqwen3 inspect DIR"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("model", metavar="FOLDER", help="a model folder or a Hub id")
    parser.add_argument("--revision", help="commit of a Hub id")


def execute(args: argparse.Namespace) -> None:
    """Print manifest and metrics.

    Raises
    ------
    UserError
        If the folder is not a complete, unquantized ColQwen3.
    """
    manifest, metrics = inspect_folder(find_model(args.model, args.revision))
    json.dump({"manifest": manifest, "metrics": metrics}, sys.stdout, indent=2, sort_keys=True)
    print()
