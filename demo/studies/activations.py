"""What 8-bit activations cost in quality: checkpoints embedded as they are served, either way.

The loss is 1 - the mean cosine of tokens to the original's embeddings in float32. Queries go in
batches of 64: alone they always have 16-bit activations.
"""

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages
from colqwen3.embedding.job import EmbeddingOptions, embed_to_file
from colqwen3.system.device import ActivationsKind
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_json
from demo.benchmarks.measure import machine
from demo.studies.scale.losses import measure_losses

ORIGINAL = Path("demo/model")
CHECKPOINTS = {name: Path("artifacts/checkpoints") / name for name in ("w4g128", "small")}
PAGE_SETS = (Path("demo/pages/evaluation"), Path("demo/pages/evaluation2"))
QUERIES_PER_BATCH = 64


def embed(folder: Path, page_set: Path, options: EmbeddingOptions, work: Path) -> Path:
    """Embed a page set with a model folder, and return the file."""
    out = work / f"{folder.name}-{page_set.name}-{options.activations}.safetensors"
    embed_to_file(
        folder,
        read_queries(page_set / "queries.jsonl"),
        find_pages(page_set / "corpus"),
        out,
        out.with_suffix(".parts"),
        options,
        "study",
    )
    return out


def measure(
    original: Path, folders: dict[str, Path], page_sets: list[Path], device: str, dtype: str
) -> dict[str, Any]:
    """Return the losses by checkpoint, activations, page set and kind."""
    work = Path(tempfile.mkdtemp())
    losses: dict[str, Any] = {name: {} for name in folders}
    plain = EmbeddingOptions(device=device, queries_per_batch=QUERIES_PER_BATCH)
    try:
        for page_set in page_sets:
            expected = embed(original, page_set, plain, work)
            for name, folder in folders.items():
                for kind in get_args(ActivationsKind):
                    served = replace(plain, dtype=dtype, activations=kind)
                    actual = embed(folder, page_set, served, work)
                    loss = measure_losses(expected, actual)
                    losses[name].setdefault(kind, {})[page_set.name] = loss
    finally:
        shutil.rmtree(work)
    return losses


def named_folder(text: str) -> tuple[str, Path]:
    """Return the parts of ``NAME=DIR``.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is anything else.
    """
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(folder)


def main() -> None:
    """Write a JSON file of losses."""
    parser = argparse.ArgumentParser(prog="python -m demo.studies.activations", description=__doc__)
    parser.add_argument("--original", type=Path, default=ORIGINAL, metavar="DIR")
    parser.add_argument(
        "--checkpoint", type=named_folder, action="append", metavar="NAME=DIR",
        help="quantized from it; default: the demo's w4g128 and small",
    )  # fmt: skip
    parser.add_argument("--page-sets", type=Path, nargs="+", default=list(PAGE_SETS), metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    folders = dict(args.checkpoint or CHECKPOINTS.items())
    if len({page_set.name for page_set in args.page_sets}) < len(args.page_sets):
        parser.error("--page-sets must have different names")
    for folder in (args.original, *folders.values()):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: is no model folder; make it, or name another")
    text = read_json(args.original / "config.json", "fetch it again")["text_config"]
    write_json(
        args.out,
        {
            "command": f"python -m demo.studies.activations --device {args.device} --dtype "
            f"{args.dtype} --original {args.original} "
            + " ".join(f"--checkpoint {name}={folder}" for name, folder in folders.items())
            + f" --page-sets {' '.join(map(str, args.page_sets))} --out FILE",
            "what": "1 - mean cosine of tokens to the original's embeddings in float32, of the "
            "runtime as it serves",
            "original": str(args.original),
            "layers": text["num_hidden_layers"],
            "hidden_size": text["hidden_size"],
            "machine": machine(args.device == "cuda"),
            "loss": measure(args.original, folders, args.page_sets, args.device, args.dtype),
        },
    )


if __name__ == "__main__":
    run(main)
