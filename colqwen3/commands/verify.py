"""Check that a released folder is, byte for byte, what its metadata say.

This detects damage, and tampering by anyone who does not also write new metadata. For more, compare
the printed digest of the metadata with a trusted one.
"""

import argparse
import sys
from pathlib import Path

from colqwen3.release.provenance import SELF_DIGEST
from colqwen3.release.verify import verify
from colqwen3.system.errors import UserError

EXAMPLE = "colqwen3 verify artifacts/release/w4g128"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a released folder")


def execute(args: argparse.Namespace) -> None:
    """Verify one folder and print every problem.

    Raises
    ------
    UserError
        If the folder is not what was released.
    """
    metadata, problems = verify(args.folder)
    for line in problems:
        print(f"error: {UserError(f'{args.folder}/{line}')}", file=sys.stderr)
    if problems:
        raise UserError(f"{args.folder}: is not what was released; fetch it or release it again")
    print(
        f"{args.folder}: {len(metadata['files'])} files and {len(metadata['tensors'])} tensors are "
        f"as released; digest of the metadata: {metadata[SELF_DIGEST]}"
    )
