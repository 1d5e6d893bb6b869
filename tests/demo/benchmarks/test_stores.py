"""The stores' recipes of docs/corpus.md, run as they stand there; and how they are measured."""

from pathlib import Path

import pytest
import torch

from colqwen3.corpus.formats import FORMATS, encode
from colqwen3.corpus.shards import Shard, write_shard
from colqwen3.corpus.sources import Source
from colqwen3.dataset.beir import Dataset
from colqwen3.dataset.pages import Page
from demo.benchmarks import stores
from stages.evaluation.retrieval import rank

PAGES, TOKENS, WIDTH = 24, 30, 64
NEEDS = {"Qdrant": "qdrant_client", "LanceDB": "lancedb", "fast-plaid": "fast_plaid"}


def unit(seed: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(tokens, WIDTH, generator=generator), dim=-1)


VECTORS = {f"p{number:02}": unit(number, TOKENS) for number in range(PAGES)}
QUERIES = {name: torch.nn.functional.normalize(page[:5] + 0.2 * unit(99, 5), dim=-1)
           for name, page in VECTORS.items()}  # fmt: skip
DATASET = Dataset(
    dict.fromkeys(QUERIES, "text"), dict.fromkeys(VECTORS, Page(Path("x"))),
    {name: {name: 1} for name in QUERIES},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vectors").mkdir()
    names = list(VECTORS)
    for number in range(2):
        shard = Shard(number, [Source(name, f"{name}.png") for name in names[12 * number :][:12]])
        pages = {page.id: encode(VECTORS[page.id], FORMATS["float16"]) for page in shard.pages}
        path = tmp_path / "vectors" / shard.file
        write_shard(path, shard, "key", pages, "float16", WIDTH, "m", None)
    (tmp_path / "vectors/_manifest.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", stores.STORES)
def test_a_recipe_finds_the_page_of_each_query(folder: Path, name: str) -> None:
    pytest.importorskip(NEEDS[name], reason="not in this environment: make test-corpus")
    if name == "fast-plaid" and not torch.__version__.startswith("2.11."):
        pytest.skip("fast-plaid needs torch 2.11.0")
    find = stores.run_recipe(name, folder)
    for query, vectors in QUERIES.items():
        found = find(vectors)
        assert (found[0], len(found), len(set(found))) == (query, 5, 5)
    figures = stores.compare(find, QUERIES, stores.exact_run(QUERIES, folder), DATASET)
    assert figures["ndcg_at_5"] == 1.0
    assert figures["top5_overlap"] > (0.6 if name == "fast-plaid" else 0.99)


def test_figures_are_those_of_what_is_found(folder: Path) -> None:
    exact = stores.exact_run(QUERIES, folder)
    best = {
        query: [exact.pages[column] for column in row]
        for query, row in zip(exact.queries, rank(exact, 5), strict=True)
    }
    by_vector = {tuple(vectors[0].tolist()): query for query, vectors in QUERIES.items()}

    def find(vectors: torch.Tensor) -> list[str]:
        return best[by_vector[tuple(vectors[0].tolist())]]

    assert stores.compare(find, QUERIES, exact, DATASET) == {"ndcg_at_5": 1.0, "top5_overlap": 1.0}
    # the page itself comes second, and only two of the five are right
    worse = stores.compare(
        lambda vectors: [name for name in VECTORS if name not in find(vectors)][:1]
        + find(vectors)[:2], QUERIES, exact, DATASET,
    )  # fmt: skip
    assert worse == {"ndcg_at_5": pytest.approx(0.63093, abs=1e-5), "top5_overlap": 0.4}


def test_every_recipe_of_the_page_is_measured() -> None:
    headings = [
        line[4:] for line in stores.PAGE.read_text().splitlines() if line.startswith("### ")
    ]
    assert headings == list(stores.STORES)
    assert all("def find(query)" in stores.recipe(name) for name in headings)
