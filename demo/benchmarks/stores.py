"""Measures the recipes of docs/corpus.md for vector stores: nDCG@5, and top-5 overlap with exact MaxSim.

Each recipe is run as it stands in the documentation, on shards of the demo's evaluation pages as
`colqwen3 embed-corpus` writes them, and asked every query. `make setup-corpus` installs the stores.

    python -m demo.benchmarks.stores --out metrics/stores.json
"""

import argparse
import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from colqwen3.corpus.job import CorpusOptions, embed_corpus, plan_corpus
from colqwen3.corpus.sources import Source
from colqwen3.dataset.beir import Dataset, read_dataset
from colqwen3.embedding.embedder import embed_texts, load_embedder
from colqwen3.system.errors import UserError, first_line, run
from colqwen3.system.files import write_json
from demo.benchmarks.measure import open_results
from stages.evaluation.retrieval import Run, measure, rank, search

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parents[2] / "docs/corpus.md"
STORES = {"Qdrant": "qdrant-client", "LanceDB": "lancedb", "fast-plaid": "fast-plaid"}
"""Heading of a recipe -> what is installed."""
DEPTH = 5
CPU = torch.device("cpu")
Find = Callable[[torch.Tensor], list[str]]


def recipe(name: str) -> str:
    """Return the code of a recipe, as the documentation has it."""
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(rf"^### {re.escape(name)}\n[^#`]*```python\n(.*?)^```", text, re.M | re.S)
    return str(code)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Be in a folder; recipes name theirs relatively."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_recipe(name: str, folder: Path) -> Find:
    """Run a recipe in a folder that holds ``vectors/``; return its `find`."""
    names: dict[str, Any] = {}
    with inside(folder):
        exec(compile(recipe(name), f"docs/corpus.md, {name}", "exec"), names)

    def find(query: torch.Tensor) -> list[str]:
        with inside(folder):
            found: list[str] = names["find"](query)
        return found

    return find


def embed(model: Path, dataset: Dataset, folder: Path) -> dict[str, torch.Tensor]:
    """Write the shards of a dataset's pages into ``vectors/``; return the vectors of its queries."""
    pages = [Source(name, str(page.path), page.number) for name, page in dataset.pages.items()]
    embed_corpus(plan_corpus(model, pages, folder / "vectors", CorpusOptions(), CPU), CPU)
    embedder = load_embedder(model, torch.float32, CPU, 1280)
    return {k: v for part in embed_texts(embedder, dataset.queries, 16) for k, v in part.items()}


def exact_run(queries: Mapping[str, torch.Tensor], folder: Path) -> Run:
    """Return the scores of exact MaxSim over the shards."""
    from colqwen3.corpus.formats import decode
    from colqwen3.corpus.shards import read_vectors

    stored = {name: decode(page, "float16") for name, page in read_vectors(folder / "vectors")}
    scores = search(list(queries.values()), list(stored.values()))
    return Run(tuple(queries), tuple(stored), scores)


def compare(find: Find, queries: Mapping[str, torch.Tensor], exact: Run, dataset: Dataset) -> Any:
    """Return nDCG@5 of what a store finds, and its top-5 overlap with exact search."""
    columns = {page: column for column, page in enumerate(exact.pages)}
    scores = torch.full(exact.scores.shape, -1.0).numpy()
    shared = 0.0
    for row, (query, best) in enumerate(zip(queries.values(), rank(exact, DEPTH), strict=True)):
        found = find(query)[:DEPTH]
        for place, page in enumerate(found):
            scores[row, columns[page]] = DEPTH - place
        shared += len({columns[page] for page in found} & set(best.tolist())) / len(best)
    run = Run(exact.queries, exact.pages, scores)
    ndcg = measure(run, dataset.relevance)["ndcg_at_5"].mean()
    return {"ndcg_at_5": round(float(ndcg), 5), "top5_overlap": round(shared / len(queries), 5)}


def main() -> None:
    """Measure the stores, and write the results after each."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.benchmarks.stores", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", type=Path, default=Path("demo/model"), metavar="DIR")
    parser.add_argument("--dataset", type=Path, default=Path("demo/pages/evaluation"))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument(
        "--stores", nargs="+", choices=STORES, default=list(STORES),
        help="what to measure; results of the others stay in the file (default: all)",
    )  # fmt: skip
    args = parser.parse_args()
    dataset = read_dataset(args.dataset)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        queries = embed(args.model, dataset, folder)
        exact = exact_run(queries, folder)
        ndcg = measure(exact, dataset.relevance)["ndcg_at_5"].mean()
        made_of = {
            "data": {"pages": len(dataset.pages), "queries": len(dataset.queries)},
            "exact": {"ndcg_at_5": round(float(ndcg), 5)},
        }
        results = open_results(args.out, made_of, "stores")
        for store in args.stores:
            try:
                figures = compare(run_recipe(store, folder), queries, exact, dataset)
            except ImportError as error:
                raise UserError(f"{store}: {first_line(error)}; run `make setup-corpus`") from None
            results["stores"][store] = {"version": version(STORES[store]), **figures}
            logger.info("%s: %s", store, figures)
            write_json(args.out, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    run(main)
