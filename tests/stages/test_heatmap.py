import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from ruamel.yaml import YAML

from colqwen3.dataset.beir import Dataset
from colqwen3.embedding.store import Embeddings, write_embeddings
from colqwen3.model.loading import load_processor
from colqwen3.system.errors import UserError
from stages import heatmap
from stages.evaluation.overlay import FULL, SMALL
from stages.evaluation.similarity import choose, similarity_map, visual_tokens
from stages.pipeline.params import PARAMS_FILE
from tests.helpers.metrics import write_json

DIM = 5
MODEL = Path("demo/model").absolute()
BEFORE, AFTER = 4, 7  # tokens of the page prompt around the visual ones, as the publisher documents


def unit(seed: int, tokens: int) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(size=(tokens, DIM))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return torch.tensor(values, dtype=torch.float32)


def score(query: torch.Tensor, page: torch.Tensor) -> float:
    """MaxSim by a loop."""
    return sum(max(float(q @ p) for p in page.numpy()) for q in query.numpy())


def test_a_cell_is_the_mean_cosine_of_the_query_with_its_token() -> None:
    query, page = unit(1, 3), unit(2, 9)
    visual = np.array([False, True, True, True, False, True, True, True, False])
    values = similarity_map(query, page, visual, (3, 2))
    cells = [1, 2, 3, 5, 6, 7]  # row-major
    for number, token in enumerate(cells):
        expected = np.mean([np.dot(q, page[token].numpy()) for q in query.numpy()])
        assert values[number // 2, number % 2] == pytest.approx(expected, abs=1e-6)
    # MaxSim with a page of that one token, by query token
    assert values[1, 0] == pytest.approx(score(query, page[3:4]) / 3, abs=1e-6)


def test_tokens_with_nan_count_as_zero() -> None:
    query, page = unit(1, 2), unit(2, 4)
    query[0, 0], page[3, 1] = float("nan"), float("inf")
    values = similarity_map(query, page, np.ones(4, dtype=np.bool_), (2, 2))
    assert values[0, 0] == pytest.approx(float(query[1] @ page[0]) / 2, abs=1e-6)
    assert values[1, 1] == 0


@pytest.mark.parametrize("tokens", [5, 7])
def test_another_number_of_tokens_is_refused(tokens: int) -> None:
    with pytest.raises(UserError, match=f"{tokens} embedded tokens, but 6 by the processor"):
        similarity_map(unit(1, 2), unit(2, tokens), np.ones(6, dtype=np.bool_), (3, 2))


def test_the_query_that_changed_most_is_chosen() -> None:
    pages = {"a": unit(10, 6), "b": unit(11, 4), "c": unit(12, 5)}
    queries = {f"q{number}": unit(20 + number, 3) for number in range(6)}
    changed = {name: unit(40 + number, 3) for number, name in enumerate(queries)}
    relevance = {
        name: {"a": 1, "b": number % 2, "c": 0} for number, name in enumerate(queries)
    }  # c answers nothing
    dataset = Dataset(dict.fromkeys(queries, "text"), {}, relevance)
    chosen = choose(dataset, Embeddings(queries, pages), Embeddings(changed, pages))
    moved = {}
    firsts = 0
    for name, judged in relevance.items():
        scores = {page: score(queries[name], pages[page]) for page in judged if judged[page]}
        page = max(scores, key=scores.__getitem__)
        moved[name, page] = score(changed[name], pages[page]) - scores[page]
        only = Dataset({name: "text"}, {}, {name: judged})
        assert choose(only, Embeddings(queries, pages), Embeddings(changed, pages)).page == page
        firsts += page == "a"
    assert 0 < firsts < len(queries)
    most = max(moved, key=lambda pair: abs(moved[pair]))
    assert (chosen.query, chosen.page) == most
    assert chosen.quantized - chosen.original == pytest.approx(moved[most], abs=1e-5)


def test_the_first_of_equal_changes_is_chosen() -> None:
    same = Embeddings({"q2": unit(1, 3), "q1": unit(2, 3)}, {"a": unit(3, 4)})
    dataset = Dataset({"q2": "x", "q1": "y"}, {}, {"q2": {"a": 1}, "q1": {"a": 1}})
    assert choose(dataset, same, same).query == "q2"


@pytest.mark.parametrize(("size", "grid"), [((320, 640), (20, 10)), ((800, 320), (10, 25))])
def test_visual_tokens_lie_between_the_words_of_the_prompt(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    visual, actual = visual_tokens(load_processor(MODEL, 1280), Image.new("RGB", size, "white"))
    assert actual == grid
    count = grid[0] * grid[1]
    assert visual.tolist() == [False] * BEFORE + [True] * count + [False] * AFTER


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params, two pages, two queries and random embeddings of original and "x"."""
    params: dict[str, Any] = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text())
    params["recipes"] = {
        "x": {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True}
    }
    params["evaluate"]["dataset"] = "data"
    monkeypatch.chdir(tmp_path)
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    (tmp_path / "data/corpus").mkdir(parents=True)
    for name in ("a", "b"):
        page = Image.new("RGB", (320, 640), "white")
        ImageDraw.Draw(page).text((20, 300), name, "black")
        page.save(f"data/corpus/{name}.png")
    lines = ['{"_id": "q1", "text": "one <b>"}', '{"_id": "q2", "text": "two"}']
    Path("data/queries.jsonl").write_text("\n".join(lines))
    Path("data/qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\t1\nq2\tb\t1\n")
    checkpoint = tmp_path / "artifacts/checkpoints/x"
    checkpoint.mkdir(parents=True)
    for path in MODEL.glob("*.json"):
        shutil.copyfile(path, checkpoint / path.name)
    for number, name in enumerate(("original", "x")):
        queries = {"q1": unit(1, 4), "q2": unit(2 + number, 4)}
        pages = {"a": unit(3, BEFORE + 200 + AFTER), "b": unit(4, BEFORE + 200 + AFTER)}
        write_embeddings(Path(f"artifacts/embeddings/{name}.safetensors"), queries, pages)
    write_results({"query": "q1", "original": result("a", 1), "quantized": result("a", 1)})
    monkeypatch.setattr(sys, "argv", ["heatmap", "x"])
    return tmp_path


def result(first: str, rank: int) -> dict[str, Any]:
    return {"first": first, "relevant": "a", "rank": rank}


def write_results(*results: dict[str, Any]) -> None:
    write_json(Path("metrics/queries/x.json"), {"queries": list(results)})


def test_the_queries_that_got_worse_are_drawn_with_both_first_pages(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def record(*args: Any) -> bytes:
        drawn.append(args)
        return b"picture"

    monkeypatch.setattr(heatmap, "picture", record)
    write_results(
        {"query": "q1", "original": result("a", 3), "quantized": result("a", 4)},
        {"query": "q2", "original": result("a", 1), "quantized": result("b", 2)},
        {"query": "q1", "original": result("a", 5), "quantized": result("b", 1)},  # gained
    )
    folder = project / "artifacts/heatmaps/x"
    (folder / "old").mkdir(parents=True)
    heatmap.main()
    assert sorted(path.name for path in folder.iterdir()) == ["01.png", "02.png", "index.json"]
    assert json.loads((folder / "index.json").read_text()) == [
        {"query": "q2", "file": "01.png"},
        {"query": "q1", "file": "02.png"},
    ]
    _, (pages, maps, captions, title, size), (_, _, same, *_) = drawn
    assert size == SMALL
    assert title == "x, page a and b, query q2: two"
    both = ((unit(2, 4), unit(3, 211)), (unit(3, 4), unit(4, 211)))  # original on a, x on b
    for values, (query, page) in zip(maps, both, strict=True):
        expected = (query.numpy() @ page.numpy()[BEFORE:-AFTER].T).mean(0).reshape(20, 10)
        np.testing.assert_allclose(values, expected, atol=1e-6)
    assert captions == [
        f"{side}: page {name}, MaxSim {score(*tokens):.3f}"
        for side, name, tokens in zip(("original", "x"), "ab", both, strict=True)
    ]
    # the pictures themselves are of those pages
    assert [page.tobytes() for page in pages] == [
        Image.open(f"data/corpus/{name}.png").tobytes() for name in "ab"
    ]
    assert "(+0.000)" in same[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "lacks a result"),
        ('{"queries": [{"query": "q1"}]}', "lacks a result"),
        ("[]", "lacks a result"),
        (
            '{"queries": [{"query": "q9", "original": {"first": "a", "rank": 1}, '
            '"quantized": {"first": "a", "rank": 2}}]}',
            "is of another dataset",
        ),
    ],
)
def test_results_of_another_kind_are_one_line(project: Path, content: str, reason: str) -> None:
    Path("metrics/queries/x.json").write_text(content)
    with pytest.raises(UserError, match=rf"queries/x\.json: {reason}.*dvc repro evaluate@x"):
        heatmap.main()


def test_the_stage_writes_a_small_picture_again_and_again_the_same(project: Path) -> None:
    out = project / "metrics/plots/x/heatmap.png"
    heatmap.main()
    first = out.read_bytes()
    assert len(first) <= 150_000
    assert Image.open(io.BytesIO(first)).format == "PNG"
    heatmap.main()
    assert out.read_bytes() == first
    # the recipe's own embeddings are in it
    pages = {"a": unit(3, 211), "b": unit(99, 211)}
    queries = {"q1": unit(1, 4), "q2": unit(3, 4)}
    write_embeddings(Path("artifacts/embeddings/x.safetensors"), queries, pages)
    heatmap.main()
    assert out.read_bytes() != first


def test_the_stage_draws_both_models_maps_of_the_changed_query(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def record(*args: Any) -> bytes:
        drawn.append(args)
        return b""

    monkeypatch.setattr(heatmap, "picture", record)
    pages = {"a": unit(3, 211), "b": unit(99, 211)}
    write_embeddings(
        Path("artifacts/embeddings/x.safetensors"), {"q1": unit(1, 4), "q2": unit(3, 4)}, pages
    )
    heatmap.main()
    ((pages, maps, captions, title, size),) = drawn
    assert size == FULL
    assert [page.size for page in pages] == [(320, 640)] * 2
    assert title == "x, page b, query q2: two"
    both = ((unit(2, 4), unit(4, 211)), (unit(3, 4), unit(99, 211)))
    for values, caption, (query, tokens) in zip(maps, captions, both, strict=True):
        expected = (query.numpy() @ tokens.numpy()[BEFORE:-AFTER].T).mean(0).reshape(20, 10)
        np.testing.assert_allclose(values, expected, atol=1e-6)
        assert f"MaxSim {score(query, tokens):.3f}" in caption


def test_embeddings_of_another_dataset_are_refused_by_name(project: Path) -> None:
    write_embeddings(
        Path("artifacts/embeddings/x.safetensors"), {"q1": unit(1, 4)}, {"a": unit(3, 211)}
    )
    with pytest.raises(UserError, match="quantized embeddings lack query 'q2'"):
        heatmap.main()
