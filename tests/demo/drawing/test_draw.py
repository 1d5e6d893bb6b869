"""The demo's pages: redrawn the same, sets with nothing in common, answers on their pages."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

from tokenizers import Tokenizer

from colqwen3.dataset.beir import read_dataset
from demo.drawing.draw import SETS, draw_set, write_texts

PAGES = Path("demo/pages")


def test_drawing_gives_the_committed_files(tmp_path: Path) -> None:
    plan = min(SETS, key=lambda plan: plan.groups)
    draw_set(plan, tmp_path)
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    remaining = sorted(p.relative_to(PAGES) for p in (PAGES / plan.name).rglob("*") if p.is_file())
    assert drawn == [path for path in remaining if path.name != "texts.jsonl"]
    for path in drawn:
        assert (tmp_path / path).read_bytes() == (PAGES / path).read_bytes(), path


def test_sets_are_disjoint() -> None:
    sets = [read_dataset(PAGES / plan.name) for plan in SETS]
    for one, other in combinations(sets, 2):
        assert not set(one.queries.values()) & set(other.queries.values())
        assert not set(one.queries) & set(other.queries)
        assert not set(one.pages) & set(other.pages)
        pixels = [{page.path.read_bytes() for page in item.pages.values()} for item in (one, other)]
        assert not pixels[0] & pixels[1]
    for first, second in combinations(SETS, 2):
        sentences = [{s for t in plan.themes for s in t.sentences} for plan in (first, second)]
        assert not sentences[0] & sentences[1]
        assert not set(first.pools["last"]) & set(second.pools["last"])


def test_second_evaluation_asks_for_one_of_pages_that_look_alike() -> None:
    plan = next(plan for plan in SETS if plan.close)
    second = read_dataset(PAGES / plan.name)
    assert len(second.pages) == plan.group * plan.groups
    assert len(second.queries) >= 200
    right = Counter(len(pages) for pages in second.relevance.values())
    assert right[1] > 0.9 * len(second.queries)
    # What tells a page from the others of its group is a number, a code, a date or a name.
    capital_or_digit = [any(c.isdigit() or c.isupper() for c in q) for q in second.queries.values()]
    assert all(capital_or_digit)


def test_texts_are_passages_of_the_asked_length(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file("demo/model/tokenizer.json")
    for path in (PAGES / "calibration" / "texts.jsonl", tmp_path / "texts.jsonl"):
        if not path.exists():
            write_texts(tokenizer, 3, path)
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert len({row["_id"] for row in rows}) == len({row["text"] for row in rows}) == 64
        lengths = [len(tokenizer.encode(row["text"]).ids) for row in rows]
        assert min(lengths) >= 120
        assert max(lengths) <= 250


def test_sets_are_as_large_as_promised() -> None:
    evaluation = read_dataset(PAGES / "evaluation")
    assert len(evaluation.pages) >= 100
    assert len(evaluation.queries) >= 200
    assert sum(path.stat().st_size for path in PAGES.rglob("*.png")) < 10e6
