"""Search by two models: the best pages by MaxSim, what changed, and what does not fit together."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from colqwen3.corpus.job import CorpusOptions, embed_corpus, plan_corpus
from colqwen3.corpus.sources import find_sources
from colqwen3.search.engine import Change, Comparison, Side
from colqwen3.system.errors import UserError
from tests.helpers.embeddings import by_loop

MODEL = Path("tests/golden/model")
CPU = torch.device("cpu")
TEXTS = {"q1": "total of the year", "q2": "pump of the boiler", "q3": "x"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with six pages and their vectors in two formats."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "in").mkdir()
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (96 + 32 * (number % 2), 128))
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"in/p{number}.png")
    for name, format_ in (("vectors", "float16"), ("pooled", "pool2-float16")):
        options = CorpusOptions(format=format_, max_num_visual_tokens=64)
        pages = find_sources([str(folder / "in")])
        embed_corpus(plan_corpus(MODEL, pages, folder / name, options, CPU), CPU)
    return folder


@pytest.fixture
def side(folder: Path) -> Side:
    return Side(str(MODEL), folder / "vectors", CPU)


def test_the_best_pages_are_those_of_maxsim(side: Side) -> None:
    query = side.embed(TEXTS)["q1"]
    scores = {name: by_loop(query, page.float()) for name, page in side.pages.items()}
    expected = sorted(scores, key=lambda name: -scores[name])[:4]
    hits = side.find(query, 4)
    assert [hit.id for hit in hits] == expected
    assert [hit.score for hit in hits] == pytest.approx([scores[n] for n in expected], abs=1e-3)


def test_queries_whose_first_page_changed_are_listed(side: Side, folder: Path) -> None:
    other = Side(str(MODEL), folder / "vectors", CPU)
    comparison = Comparison(side, other)
    assert comparison.changes(TEXTS) == []
    query = other.embed(TEXTS)["q2"]
    best, second = (hit.id for hit in other.find(query, 2))
    other.pages[second] = torch.cat([query, query]).half()  # now nothing matches better
    changes = comparison.changes(TEXTS)
    assert Change("q2", TEXTS["q2"], best, second) in changes
    results = comparison.search(TEXTS["q2"], 3)
    assert list(results) == ["original", "quantized"]
    assert [hits[0].id for _, hits in results.values()] == [best, second]


def test_a_page_is_drawn_under_its_map_and_a_pooled_one_as_it_is(side: Side, folder: Path) -> None:
    query = side.embed(TEXTS)["q1"]
    page = next(iter(side.pages))
    drawn = side.picture(query, page, 300)
    assert drawn.mode == "RGB"
    assert np.asarray(drawn).std(-1).max() > 0  # has colours, the page has none
    pooled = Side(str(MODEL), folder / "pooled", CPU).picture(query, page, 300)
    assert np.asarray(pooled).std(-1).max() == 0


def test_what_does_not_fit_together_is_rejected(side: Side, folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"_manifest\.json: is of another model"):
        Side(str(model), folder / "vectors", CPU)
    with pytest.raises(UserError, match=r"_manifest\.json: cannot be read"):
        Side(str(MODEL), tmp_path, CPU)
    other = Side(str(MODEL), folder / "vectors", CPU)
    gone = next(iter(other.pages))
    del other.pages[gone]
    with pytest.raises(UserError, match=r"has vectors of one model only"):
        Comparison(side, other)
