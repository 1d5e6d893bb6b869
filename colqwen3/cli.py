"""The command `colqwen3`: one subcommand per module of `colqwen3.commands`."""

import argparse
import importlib

from colqwen3.system.errors import run

COMMANDS = {
    "embed": "embed",
    "embed-corpus": "embed_corpus",
    "search": "search",
    "inspect": "inspect_model",
    "verify": "verify",
    "export-gguf": "export_gguf",
    "export-colpali": "export_colpali",
    "oracle": "oracle",
    "benchmark-vidore": "benchmark_vidore",
}
"""Subcommand -> module of `colqwen3.commands`."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="colqwen3", description="ColQwen3 visual-document retrievers, original or quantized."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(f"colqwen3.commands.{module_name}")
        text = (module.__doc__ or "").strip()
        subparser = subparsers.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(execute=module.execute, parser=subparser)
    return parser


def main() -> None:
    """Run the subcommand of the command line."""
    args = build_parser().parse_args()
    run(lambda: args.execute(args))


if __name__ == "__main__":
    main()
