import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from ruamel.yaml import YAML

from colqwen3.embedding.store import write_embeddings
from colqwen3.system.errors import UserError
from stages import heatmap
from stages.evaluation.overlay import FULL, SMALL
from stages.pipeline.params import PARAMS_FILE
from tests.helpers.embeddings import by_loop, unit
from tests.helpers.metrics import write_json

MODEL = Path("demo/model").absolute()
BEFORE, AFTER = 4, 7  # tokens of the page prompt around the visual ones, as the publisher documents


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
        f"{side}: page {name}, MaxSim {by_loop(*tokens):.3f}"
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
        assert f"MaxSim {by_loop(query, tokens):.3f}" in caption


def test_embeddings_of_another_dataset_are_refused_by_name(project: Path) -> None:
    write_embeddings(
        Path("artifacts/embeddings/x.safetensors"), {"q1": unit(1, 4)}, {"a": unit(3, 211)}
    )
    with pytest.raises(UserError, match="quantized embeddings lack query 'q2'"):
        heatmap.main()
