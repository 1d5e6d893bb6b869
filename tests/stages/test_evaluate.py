import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from colqwen3.dataset.beir import Dataset
from colqwen3.dataset.pages import Page
from colqwen3.embedding.store import Embeddings, write_embeddings
from colqwen3.system.errors import UserError, run
from stages import evaluate
from stages.pipeline.params import PARAMS_FILE

NAN, INF = float("nan"), float("inf")
DIM = 6
QUERIES = {"q2": 4, "q1": 3, "q3": 5}  # id -> tokens
PAGES = {"a": 7, "b": 5, "c": 9, "d": 1}
RELEVANCE = {"q2": {"a": 1}, "q1": {"c": 2, "d": 1}, "q3": {"b": 1}}


def draw(seed: int, noise: float) -> Embeddings:
    """Unit tokens that are the same for every seed but for the noise."""

    def items(counts: dict[str, int], base: int) -> dict[str, torch.Tensor]:
        drawn = {}
        for number, (name, tokens) in enumerate(counts.items()):
            values = np.random.default_rng(base + number).normal(size=(tokens, DIM))
            values += noise * np.random.default_rng([seed, base + number]).normal(size=values.shape)
            values /= np.linalg.norm(values, axis=1, keepdims=True)
            drawn[name] = torch.tensor(values, dtype=torch.float32)
        return drawn

    return Embeddings(items(QUERIES, 100), items(PAGES, 200))


DATASET = Dataset(dict.fromkeys(QUERIES, "text"), dict.fromkeys(PAGES, Page(Path("x"))), RELEVANCE)
ORIGINAL, QUANTIZED = draw(0, 0.0), draw(1, 0.4)
MODEL = {
    "components": {
        "language_model": {"bytes": 4000},
        "projection": {"bytes": 100},
        "token_embeddings": {"bytes": 500},
        "vision": {"bytes": 700},
    },
    "files_bytes": 6000,
}
QUANTIZE = {
    "bytes": {
        "components": {
            "language_model": 1000,
            "projection": 100,
            "token_embeddings": 500,
            "vision": 700,
        },
        "files": 2400,
    }
}


def by_loop(query: torch.Tensor, page: torch.Tensor) -> float:
    products = query.double().numpy() @ page.double().numpy().T
    return math.fsum(max(row) for row in products.tolist())


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms


def token_cosines(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[float]:
    return sorted(
        cosine(a, b)
        for name in before
        for a, b in zip(before[name].tolist(), after[name].tolist(), strict=True)
    )


@pytest.mark.parametrize("kind", ["queries", "pages"])
def test_token_cosines_equal_a_loop(kind: str) -> None:
    before, after = getattr(ORIGINAL, kind), getattr(QUANTIZED, kind)
    expected = token_cosines(before, after)
    place = 0.01 * (len(expected) - 1)  # between the lowest two
    p01 = expected[0] + place * (expected[1] - expected[0])
    assert evaluate.compare_tokens(before, after) == {
        "cosine": {
            "mean": pytest.approx(sum(expected) / len(expected), abs=1e-12),
            "p01": pytest.approx(p01, abs=1e-12),
            "min": pytest.approx(expected[0], abs=1e-12),
        },
        "nonfinite": 0,
        "nonfinite_original": 0,
    }


def test_flattened_cosine_counts_every_query_alike() -> None:
    # lengths differ, so that it is no mean of token cosines
    before = {"long": torch.tensor([[3.0, 0.0], [0.0, 1.0]]), "short": torch.tensor([[1.0, 0.0]])}
    after = {"long": torch.tensor([[3.0, 0.0], [1.0, 0.0]]), "short": torch.tensor([[0.0, 1.0]])}
    assert evaluate.flattened_cosine(before, after) == pytest.approx((0.9 + 0) / 2)


@pytest.mark.parametrize(
    ("limit", "above", "below"),
    [(0.95, "EXCELLENT", "GOOD"), (0.90, "GOOD", "FAIR"), (0.85, "FAIR", "POOR")],
)
def test_grades_on_both_sides_of_each_limit(limit: float, above: str, below: str) -> None:
    assert evaluate.grade(limit) == above
    assert evaluate.grade(limit - 1e-8) == below
    assert (evaluate.grade(1.0), evaluate.grade(-1.0)) == ("EXCELLENT", "POOR")


def retrieval_by_loop(queries: Embeddings, pages: Embeddings) -> dict[str, float]:
    """nDCG@5 and recall@1 and the margin, without the code under test."""
    ndcg, recall, margin = [], [], []
    for name, judged in RELEVANCE.items():
        scores = {stem: by_loop(queries.queries[name], pages.pages[stem]) for stem in PAGES}
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        gains = [judged.get(stem, 0) / math.log2(rank + 2) for rank, stem in enumerate(ranked)]
        best = sorted(judged.values(), reverse=True)
        ndcg.append(sum(gains) / sum(gain / math.log2(rank + 2) for rank, gain in enumerate(best)))
        recall.append((ranked[0] in judged) / len(judged))
        others = [score for stem, score in scores.items() if stem not in judged]
        margin.append(max(scores[stem] for stem in judged) - max(others))
    figures = {"ndcg_at_5": ndcg, "recall_at_1": recall, "margin": margin}
    return {name: sum(values) / len(values) for name, values in figures.items()}


def test_retrieval_and_mixed_index_equal_a_loop() -> None:
    metrics, _ = evaluate.evaluate(DATASET, ORIGINAL, QUANTIZED)
    original = retrieval_by_loop(ORIGINAL, ORIGINAL)
    for section, pages in (("retrieval", QUANTIZED), ("mixed_index", ORIGINAL)):
        quantized = retrieval_by_loop(QUANTIZED, pages)
        for name, value in quantized.items():
            figures = metrics[section][name]
            assert figures["original"] == pytest.approx(original[name], abs=1e-6)
            assert figures["quantized"] == pytest.approx(value, abs=1e-6)
            assert figures["difference"] == pytest.approx(value - original[name], abs=1e-6)
    # the two differ, or the test would not tell them apart
    assert metrics["retrieval"]["margin"] != metrics["mixed_index"]["margin"]


def test_points_are_the_scores_of_the_best_relevant_page() -> None:
    _, points = evaluate.evaluate(DATASET, ORIGINAL, QUANTIZED)
    assert [point["query"] for point in points] == list(QUERIES)
    for point in points:
        for key, side in (("original", ORIGINAL), ("quantized", QUANTIZED)):
            query = side.queries[point["query"]]
            best = max(by_loop(query, side.pages[stem]) for stem in RELEVANCE[point["query"]])
            assert point[key] == pytest.approx(best, abs=1e-6)


def test_an_equal_model_loses_nothing() -> None:
    metrics, _ = evaluate.evaluate(DATASET, ORIGINAL, ORIGINAL)
    assert evaluate.round_floats(metrics["queries"]["cosine"]) == {"mean": 1, "p01": 1, "min": 1}
    assert metrics["queries"]["grade"] == "EXCELLENT"
    figures = metrics["retrieval"]
    assert figures["top1_agreement"] == figures["top5_overlap"] == 1
    assert figures["spearman"] == pytest.approx(1)
    for name in ("ndcg_at_5", "ndcg_at_10", "recall_at_1", "recall_at_5", "margin"):
        assert {figures[name][key] for key in ("difference", "low", "high")} == {0}


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    return [] if isinstance(value, str) else [value]


def with_rows(
    items: dict[str, torch.Tensor], name: str, rows: dict[int, list[float]]
) -> dict[str, torch.Tensor]:
    changed = items[name].clone()
    for row, values in rows.items():
        changed[row, : len(values)] = torch.tensor(values)
    return {**items, name: changed}


def test_nonfinite_values_are_counted_and_every_figure_stays_finite() -> None:
    queries = with_rows(QUANTIZED.queries, "q1", {1: [NAN, INF]})
    pages = with_rows(QUANTIZED.pages, "a", {0: [-INF]})
    pages = with_rows(pages, "d", {0: [NAN] * DIM})  # a page without a finite token
    broken = Embeddings(queries, pages)
    original = Embeddings(ORIGINAL.queries, with_rows(ORIGINAL.pages, "c", {4: [NAN]}))
    metrics, points = evaluate.evaluate(DATASET, original, broken)
    assert all(math.isfinite(number) for number in numbers(metrics) + numbers(points[0]))
    assert (metrics["queries"]["nonfinite"], metrics["queries"]["nonfinite_original"]) == (2, 0)
    assert (metrics["pages"]["nonfinite"], metrics["pages"]["nonfinite_original"]) == (1 + DIM, 1)


def test_nonfinite_tokens_are_left_out_of_cosines_and_of_scores() -> None:
    original = Embeddings(ORIGINAL.queries, with_rows(ORIGINAL.pages, "c", {4: [0.0, NAN]}))
    queries = with_rows(QUANTIZED.queries, "q1", {1: [NAN, INF]})
    pages = with_rows(QUANTIZED.pages, "a", {0: [-INF]})

    def cut(items: dict[str, torch.Tensor], name: str, row: int) -> dict[str, torch.Tensor]:
        return {**items, name: torch.cat([items[name][:row], items[name][row + 1 :]])}

    metrics, _ = evaluate.evaluate(DATASET, original, Embeddings(queries, pages))
    # the same tokens taken out by hand; a score keeps those that only the other model lacks
    after = Embeddings(cut(queries, "q1", 1), cut(pages, "a", 0))
    before = Embeddings(cut(original.queries, "q1", 1), cut(cut(original.pages, "a", 0), "c", 4))
    both = Embeddings(after.queries, cut(after.pages, "c", 4))
    for kind in ("queries", "pages"):
        expected = token_cosines(getattr(before, kind), getattr(both, kind))
        assert metrics[kind]["cosine"]["mean"] == pytest.approx(np.mean(expected))
        assert metrics[kind]["cosine"]["min"] == pytest.approx(expected[0])
    flattened = [
        cosine(before.queries[name].flatten().tolist(), after.queries[name].flatten().tolist())
        for name in QUERIES
    ]
    assert metrics["queries"]["flattened_cosine"] == pytest.approx(np.mean(flattened), abs=1e-7)
    for name, value in retrieval_by_loop(after, after).items():
        assert metrics["retrieval"][name]["quantized"] == pytest.approx(value, abs=1e-6)


def test_a_page_without_a_finite_token_scores_0() -> None:
    dataset = Dataset(DATASET.queries, DATASET.pages, {name: {"d": 1} for name in QUERIES})
    pages = with_rows(QUANTIZED.pages, "d", {0: [NAN]})
    _, points = evaluate.evaluate(dataset, ORIGINAL, Embeddings(QUANTIZED.queries, pages))
    assert [point["quantized"] for point in points] == [0, 0, 0]


def test_a_model_of_nothing_but_nan_has_cosine_0() -> None:
    broken = {name: torch.full_like(tokens, NAN) for name, tokens in ORIGINAL.queries.items()}
    metrics, _ = evaluate.evaluate(DATASET, ORIGINAL, Embeddings(broken, ORIGINAL.pages))
    assert metrics["queries"]["cosine"] == {"mean": 0, "p01": 0, "min": 0}
    assert (metrics["queries"]["flattened_cosine"], metrics["queries"]["grade"]) == (0, "POOR")


def test_a_zero_vector_has_cosine_0() -> None:
    a, b = (
        {"q": torch.tensor([[0.0, 0.0], [1.0, 0.0]])},
        {"q": torch.tensor([[1.0, 0.0], [1.0, 0.0]])},
    )
    assert evaluate.token_cosines(a, b).tolist() == [0, 1]
    assert evaluate.token_cosines(b, a).tolist() == [0, 1]


def without(items: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in items.items() if key != name}


@pytest.mark.parametrize(
    ("original", "quantized", "reason"),
    [
        (
            ORIGINAL,
            Embeddings(without(QUANTIZED.queries, "q1"), QUANTIZED.pages),
            "lack query 'q1'",
        ),
        (ORIGINAL, Embeddings(QUANTIZED.queries, without(QUANTIZED.pages, "c")), "lack page 'c'"),
        (
            Embeddings(ORIGINAL.queries, {**ORIGINAL.pages, "x": ORIGINAL.pages["a"]}),
            QUANTIZED,
            "hold an unknown page 'x'",
        ),
        (
            ORIGINAL,
            Embeddings(QUANTIZED.queries, {**QUANTIZED.pages, "b": torch.ones(4, DIM)}),
            "page 'b' is [5, 6] in the original embeddings, [4, 6] in the quantized",
        ),
        (
            ORIGINAL,
            Embeddings({**QUANTIZED.queries, "q3": torch.ones(5, 2)}, QUANTIZED.pages),
            "query 'q3' is [5, 6]",
        ),
    ],
)
def test_refuses_embeddings_of_other_items_or_shapes(
    original: Embeddings, quantized: Embeddings, reason: str
) -> None:
    evaluate.check_items(DATASET, ORIGINAL, QUANTIZED)
    with pytest.raises(UserError) as caught:
        evaluate.check_items(DATASET, original, quantized)
    assert reason in str(caught.value)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with everything the stage reads for recipe `low`."""
    params = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text(encoding="utf-8"))
    params["evaluate"]["dataset"] = "data"
    params["recipes"] = {
        "low": {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 128, "sym": True}
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", "low"])
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    Path("data/corpus").mkdir(parents=True)
    for stem in PAGES:
        Image.new("L", (4, 4)).save(f"data/corpus/{stem}.png")
    lines = [json.dumps({"_id": name, "text": "some words"}) for name in QUERIES]
    Path("data/queries.jsonl").write_text("\n".join(lines))
    judged = [f"{q}\t{p}\t{s}" for q, scores in RELEVANCE.items() for p, s in scores.items()]
    Path("data/qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    write_embeddings(
        Path("artifacts/embeddings/original.safetensors"), ORIGINAL.queries, ORIGINAL.pages
    )
    write_embeddings(
        Path("artifacts/embeddings/low.safetensors"), QUANTIZED.queries, QUANTIZED.pages
    )
    Path("metrics/quantize").mkdir(parents=True)
    Path("metrics/model.json").write_text(json.dumps(MODEL))
    Path("metrics/quantize/low.json").write_text(json.dumps(QUANTIZE))
    return tmp_path


def fail(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        run(evaluate.main)
    assert caught.value.code == 1
    assert not Path("metrics/low.json").exists()
    return capsys.readouterr().err.splitlines()[-1]


def test_the_stage_writes_metrics_and_plot(project: Path) -> None:
    run(evaluate.main)
    files = [Path("metrics/low.json"), Path("metrics/plots/low/scores.json")]
    first = [file.read_bytes() for file in files]
    metrics, points = (json.loads(content) for content in first)
    expected, expected_points = evaluate.evaluate(DATASET, ORIGINAL, QUANTIZED)
    sizes = metrics.pop("size")
    assert metrics == json.loads(json.dumps(evaluate.round_floats(expected)))
    assert points == evaluate.round_floats(expected_points)
    assert sizes == {
        "files": {"original": 6000, "quantized": 2400, "ratio": 2.5, "reduction_percent": 60},
        "language_model": {
            "original": 4000,
            "quantized": 1000,
            "ratio": 4,
            "reduction_percent": 75,
        },
        "projection": {"original": 100, "quantized": 100, "ratio": 1, "reduction_percent": 0},
        "token_embeddings": {"original": 500, "quantized": 500, "ratio": 1, "reduction_percent": 0},
        "vision": {"original": 700, "quantized": 700, "ratio": 1, "reduction_percent": 0},
    }
    assert all(number == round(number, 8) for number in numbers(metrics))
    assert str(project) not in first[0].decode()
    run(evaluate.main)
    assert [file.read_bytes() for file in files] == first


def test_the_order_of_stored_items_changes_nothing(project: Path) -> None:
    run(evaluate.main)
    first = Path("metrics/low.json").read_bytes()
    turned = (dict(reversed(items.items())) for items in (QUANTIZED.queries, QUANTIZED.pages))
    write_embeddings(Path("artifacts/embeddings/low.safetensors"), *turned)
    run(evaluate.main)
    assert Path("metrics/low.json").read_bytes() == first


def test_an_unknown_recipe_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "high"])
    assert "recipes.high does not exist" in fail(capsys)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("metrics/model.json", {**MODEL, "files_bytes": None}, "files_bytes is None"),
        (
            "metrics/model.json",
            {"files_bytes": 1, "components": []},
            "components.language_model.bytes is",
        ),
        (
            "metrics/quantize/low.json",
            {"bytes": {**QUANTIZE["bytes"], "files": 0}},
            "bytes.files is 0",
        ),
        ("metrics/quantize/low.json", [], "bytes.files is None"),
    ],
)
def test_metrics_without_bytes_are_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], file: str, content: Any, reason: str
) -> None:
    Path(file).write_text(json.dumps(content))
    line = fail(capsys)
    assert line.startswith(f"error: {file}: ")
    assert reason in line
    assert "dvc repro" in line


def test_embeddings_of_other_tokens_are_one_line(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = {**QUANTIZED.pages, "b": torch.ones(4, DIM)}
    write_embeddings(Path("artifacts/embeddings/low.safetensors"), QUANTIZED.queries, pages)
    assert fail(capsys).startswith("error: page 'b' is [5, 6] in the original embeddings")


def test_missing_embeddings_are_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("artifacts/embeddings/low.safetensors").unlink()
    assert fail(capsys).startswith("error: artifacts/embeddings/low.safetensors: cannot be read")
