"""Turned and transparent pages are retrieved as well as the same pages stored plainly."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages
from colqwen3.embedding.embedder import Plain, embed_pages, embed_texts
from colqwen3.model import ColQwen3, ColQwen3Processor
from colqwen3.model.loading import load_model, load_processor
from colqwen3.model.scoring import max_sim
from tests.helpers.odd_pages import exif

MODEL, DATASET = Path("demo/model"), Path("demo/pages/evaluation")
PAGES = 8


@pytest.fixture(scope="module")
def model() -> ColQwen3:
    return load_model(MODEL, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def processor() -> ColQwen3Processor:
    return load_processor(MODEL, 1280)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    for path in sorted((DATASET / "corpus").glob("*.png"))[:PAGES]:
        with Image.open(path) as image:
            image.convert("RGB").save(folder / path.name)
    return folder


def turned(page: Image.Image, path: Path) -> None:
    """Store a page as a camera held sideways does."""
    page.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif(6))


def transparent(page: Image.Image, path: Path) -> None:
    """Store a page whose paper is transparent black."""
    ink = ImageChops.invert(page.convert("L")).point(lambda value: 255 if value else 0)
    stored = Image.new("RGBA", page.size, (0, 0, 0, 0))
    stored.paste(page, mask=ink)
    stored.putalpha(ink)
    stored.save(path)


@pytest.mark.parametrize("store", [turned, transparent])
def test_recall_is_that_of_plain_pages(
    model: ColQwen3, processor: ColQwen3Processor, plain: Path, tmp_path: Path, store: object
) -> None:
    assert callable(store)
    ignored = tmp_path / "ignored"  # the same pages as a reader sees them that ignores all this
    (tmp_path / "odd").mkdir()
    ignored.mkdir()
    for path in plain.iterdir():
        with Image.open(path) as page:
            store(page, tmp_path / "odd" / path.name)
        with Image.open(tmp_path / "odd" / path.name) as stored:
            Image.frombytes("RGB", stored.size, stored.convert("RGB").tobytes()).save(
                ignored / path.name
            )
    recalls = [
        recall_at_1(model, processor, folder) for folder in (plain, tmp_path / "odd", ignored)
    ]
    assert recalls[0] == recalls[1]
    assert recalls[0] > 0.9
    assert recalls[2] < recalls[0] - 0.3  # so the pages are such as to show a mistake


def recall_at_1(model: ColQwen3, processor: ColQwen3Processor, folder: Path) -> float:
    pages = find_pages(folder)
    texts = read_queries(DATASET / "queries.jsonl")
    with (DATASET / "qrels.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    answers = {row["query-id"]: row["corpus-id"] for row in rows if row["corpus-id"] in pages}
    queries = {name: texts[name] for name in answers}
    query_vectors = {
        k: v for part in embed_texts(Plain(model, processor), queries, 16) for k, v in part.items()
    }
    page_vectors = {
        k: v for part in embed_pages(Plain(model, processor), pages, 1280) for k, v in part.items()
    }
    best = max_sim(list(query_vectors.values()), list(page_vectors.values())).argmax(1).tolist()
    names = list(page_vectors)
    hits: list[bool] = [
        names[place] == answers[query] for query, place in zip(queries, best, strict=True)
    ]
    return hits.count(True) / len(hits)
