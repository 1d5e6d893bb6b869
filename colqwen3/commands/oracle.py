"""Check the 4B model against public scores: pass or fail for the original, the loss for a quantized one.

Four public pages and two queries, MaxSim of TomoroAI/tomoro-colqwen3-embed-4b in float32, to within
0.001. Run it on the original before quantizing and on the result after.
"""

import argparse
import sys
from pathlib import Path

from colqwen3.commands.embed import add_model_options

EXAMPLE = "colqwen3 oracle --model TomoroAI/tomoro-colqwen3-embed-4b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", required=True)
    parser.add_argument("--revision", help="commit of a Hub id")
    parser.add_argument(
        "--pages", type=Path, metavar="DIR",
        help="folder of the oracle's pages (default: they are fetched from the Hub)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there too")
    add_model_options(parser)


def execute(args: argparse.Namespace) -> None:
    """Compute the scores, print them beside the expected ones; exit with status 1 on a fail.

    Raises
    ------
    UserError
        If model or pages cannot be read, or the model is not the oracle's.
    """
    from colqwen3.checkpoint.hub import find_model
    from colqwen3.model.loading import load_model, load_processor, quantization_config
    from colqwen3.release import oracle as oracles
    from colqwen3.system.device import DTYPES, choose_device
    from colqwen3.system.files import read_json, write_json

    oracle = oracles.TOMORO_4B
    folder = find_model(args.model, args.revision, args.trust_remote_code)
    quantized = quantization_config(folder) is not None
    oracles.check_model(oracle, read_json(folder / "config.json", "give a complete folder"))
    pages = oracles.find_pages(oracle, args.pages)
    model = load_model(
        folder, DTYPES[args.dtype], choose_device(args.device), args.trust_remote_code
    )
    processor = load_processor(folder, args.max_num_visual_tokens, args.trust_remote_code)
    scores = oracles.compute_scores(oracle, pages, model, processor)
    result = {**oracles.judge(oracle, scores, quantized), "dtype": args.dtype}
    for row, expected in zip(result["scores"], result["expected"], strict=True):
        print("scores", *(f"{value:9.5f}" for value in row))
        print("  of  ", *(f"{value:9.5f}" for value in expected))
    print(
        f"difference of a score: {result['largest_difference']} at most, {result['mean_difference']} on "
        f"average ({result['mean_relative_difference']:.2%})"
    )
    print(f"{result['verdict']}: {result['reason']}")
    if args.out:
        write_json(args.out, result)
    if result["verdict"] == "fail":
        sys.exit(1)
