"""Peak memory of the evaluation on synthetic embeddings of many pages, each size in a process of its own.

    PYTHONPATH=. python tests/slow/evaluate_memory.py [--pages 2000 20000] [--tokens 64] [--width 128]

A page of the 4B model has up to about 1,280 tokens of width 320, 1.6 MB in float32: 20,000 pages of
two models would take 64 GB of disk. Fewer and narrower tokens show the same: what is in memory is
one batch of pages, and the scores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from colqwen3.dataset.beir import Dataset
from colqwen3.dataset.pages import Page
from colqwen3.embedding.store import open_embeddings, write_embeddings
from stages.evaluation.comparison import check_items, evaluate, round_figures

QUERY_TOKENS = 20
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Shape:
    """Size of a synthetic dataset and of its embeddings."""

    pages: int
    queries: int
    tokens: int
    width: int


class Synthetic(Mapping[str, torch.Tensor]):
    """Unit tokens by name, drawn when they are asked for; `noise` tells the models apart."""

    def __init__(self, kind: str, count: int, tokens: int, width: int, noise: float) -> None:
        self._names = {f"{kind}{number}": number for number in range(count)}
        self._tokens, self._width, self._noise = tokens, width, noise

    def __getitem__(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._names[name])
        values = torch.randn(2, self._tokens, self._width, generator=generator)
        return torch.nn.functional.normalize(values[0] + self._noise * values[1], dim=-1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_both(folder: Path, shape: Shape) -> None:
    """Write the embeddings of both models, item by item."""
    for name, noise in {"original": 0.0, "quantized": 0.2}.items():
        write_embeddings(
            folder / f"{name}.safetensors",
            Synthetic("q", shape.queries, QUERY_TOKENS, shape.width, noise),
            Synthetic("p", shape.pages, shape.tokens, shape.width, noise),
        )


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(folder: Path, shape: Shape) -> dict[str, Any]:
    """Evaluate the files of `write_both` in this process; return what memory that took."""
    queries = {f"q{number}": "text" for number in range(shape.queries)}
    pages = {f"p{number}": Page(Path("p.png")) for number in range(shape.pages)}
    relevance = {name: {f"p{number}": 1} for number, name in enumerate(queries)}
    dataset = Dataset(queries, pages, relevance)
    warm_up(dataset)
    before, start = peak_bytes(), time.perf_counter()
    original, quantized = (
        open_embeddings(folder / f"{name}.safetensors") for name in ("original", "quantized")
    )
    check_items(dataset, original, quantized)
    comparison = evaluate(dataset, original, quantized)
    return {
        **asdict(shape),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_before": before,
        "peak_after": peak_bytes(),
        "scores": 3 * 4 * shape.pages * shape.queries,
        "files": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "page_cosine": round_figures(comparison.metrics)["pages"]["cosine"]["mean"],
    }


def warm_up(dataset: Dataset) -> None:
    """Evaluate two items, so that libraries have their own memory before it is measured."""
    small = Shape(2, 2, 4, 8)
    part = Dataset(
        dict(list(dataset.queries.items())[:2]),
        dict(list(dataset.pages.items())[:2]),
        {name: {"p0": 1} for name in list(dataset.queries)[:2]},
    )
    with tempfile.TemporaryDirectory() as name:
        write_both(Path(name), small)
        stored = [open_embeddings(path) for path in sorted(Path(name).iterdir())]
        evaluate(part, *stored)


def measure_alone(folder: Path, shape: Shape) -> dict[str, Any]:
    """Return `measure` of a process that does nothing else."""
    code = (
        "import json, sys; from pathlib import Path; from tests.slow.evaluate_memory import *; "
        "print(json.dumps(measure(Path(sys.argv[1]), Shape(*map(int, sys.argv[2:])))))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(folder), *map(str, asdict(shape).values())],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="PYTHONPATH=. python tests/slow/evaluate_memory.py", description=__doc__
    )
    parser.add_argument("--pages", type=int, nargs="+", default=[2_000, 20_000])
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument(
        "--folder", type=Path, help="where to write the files; two are deleted again"
    )
    args = parser.parse_args()
    for pages in args.pages:
        shape = Shape(pages, args.queries, args.tokens, args.width)
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            write_both(Path(name), shape)
            result = measure_alone(Path(name), shape)
        mega = {key: result[key] / 1e6 for key in ("peak_before", "peak_after", "scores", "files")}
        print(
            f"{pages:,} pages and {args.queries:,} queries: files {mega['files']:,.0f} MB, scores "
            f"{mega['scores']:,.0f} MB; peak {mega['peak_before']:,.0f} MB before, "
            f"{mega['peak_after']:,.0f} MB after ({result['seconds']} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
