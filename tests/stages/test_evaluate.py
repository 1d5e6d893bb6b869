import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from colqwen3.checkpoint.tensor_file import StoredTensors
from colqwen3.embedding.store import write_embeddings
from colqwen3.system.errors import run
from stages import evaluate
from stages.evaluation import comparison
from stages.evaluation.comparison import round_figures, round_points
from stages.evaluation.limits import GateParams, judge
from stages.pipeline.params import PARAMS_FILE
from tests.helpers.embeddings import DATASET, DIM, ORIGINAL, PAGES, QUANTIZED, QUERIES, RELEVANCE
from tests.helpers.metrics import write_json

MODEL: dict[str, Any] = {
    "components": {
        "language_model": {"bytes": 4000},
        "projection": {"bytes": 100},
        "token_embeddings": {"bytes": 500},
        "vision": {"bytes": 700},
    },
    "files_bytes": 6000,
}
QUANTIZE: dict[str, Any] = {
    "bytes": {
        "components": {
            "language_model": 1000,
            "projection": 100,
            "token_embeddings": 500,
            "vision": 700,
        },
        "files": 2400,
    },
    "calibration": {"samples": 0},
    "relative_weight_error": {"0.mlp.up_proj": 0.1, "1.mlp.up_proj": 0.3},
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with everything the stage reads for recipe `low`."""
    params = YAML(typ="safe", pure=True).load(PARAMS_FILE.read_text(encoding="utf-8"))
    params["evaluate"].update(dataset="data", index=["int8", "pool2-float16"])
    params["calibration"]["dataset"] = "tuning"
    params["gate"] = dict.fromkeys(params["gate"])
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
    write_json(Path("metrics/model.json"), MODEL)
    write_json(Path("artifacts/quantize/low.json"), QUANTIZE)
    return tmp_path


def fail(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        run(evaluate.main)
    assert caught.value.code == 1
    assert not Path("metrics/quality/low.json").exists()
    return capsys.readouterr().err.splitlines()[-1]


RESULTS = [
    Path(f"metrics/{name}")
    for name in (
        "index/low.json", "quality/low.json", "quantize/low.json", "queries/low.json", "summary/low.json",
        "plots/low/scores.json", "plots/low/layers.json",
    )
]  # fmt: skip


def test_the_stage_writes_metrics_and_plots(project: Path) -> None:
    run(evaluate.main)
    first = [file.read_bytes() for file in RESULTS]
    index, metrics, quantization, queries, summary, points, layers = map(json.loads, first)
    assert list(index["formats"]) == ["float32", "int8", "pool2-float16"]
    exact = index["formats"]["float32"]
    for side in ("original", "quantized"):
        assert exact[side]["ndcg_at_5"] == metrics["retrieval"]["ndcg_at_5"][side]
    assert exact["quantized"]["top5_overlap"] == metrics["retrieval"]["top5_overlap"]
    expected = comparison.evaluate(DATASET, ORIGINAL, QUANTIZED)
    sizes = metrics.pop("size")
    assert metrics.pop("overlap") == {"same_folder": False, "pages": 0, "queries": 0}
    assert metrics.pop("quantization") == {"layers_worse_than_rounding": 0}
    assert metrics == json.loads(json.dumps(round_figures(expected.metrics)))
    assert points == round_points(expected.points)
    assert queries == {"queries": expected.results}
    assert layers == [
        {"layer": "0.mlp.up_proj", "error": 0.1}, {"layer": "1.mlp.up_proj", "error": 0.3}
    ]  # fmt: skip
    assert quantization == QUANTIZE | {"relative_weight_error": {"mean": 0.2, "max": 0.3}}
    assert summary["cos_page"] == metrics["pages"]["cosine"]["mean"]
    assert summary["verdict"] == "within limits"  # three queries
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
    assert str(project) not in b"".join(first).decode()
    run(evaluate.main)
    assert [file.read_bytes() for file in RESULTS] == first


def test_the_order_of_stored_items_changes_nothing(project: Path) -> None:
    run(evaluate.main)
    first = Path("metrics/quality/low.json").read_bytes()
    turned = (dict(reversed(list(items.items()))) for items in (QUANTIZED.queries, QUANTIZED.pages))
    write_embeddings(Path("artifacts/embeddings/low.safetensors"), *turned)
    run(evaluate.main)
    assert Path("metrics/quality/low.json").read_bytes() == first


def test_an_unknown_recipe_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "high"])
    line = fail(capsys)
    assert line.startswith("error: artifacts/embeddings/high.safetensors: cannot be read")


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
            "artifacts/quantize/low.json",
            {"bytes": {**QUANTIZE["bytes"], "files": 0}},
            "bytes.files is 0",
        ),
        ("artifacts/quantize/low.json", [], "bytes.files is None"),
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


@pytest.mark.parametrize("key", ["calibration", "relative_weight_error"])
def test_a_record_that_lacks_a_figure_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    record = {name: value for name, value in QUANTIZE.items() if name != key}
    write_json(Path("artifacts/quantize/low.json"), record)
    line = fail(capsys)
    assert line.startswith("error: artifacts/quantize/low.json: lacks a figure")
    assert "dvc repro quantize@low" in line


def tune(record: dict[str, Any] = QUANTIZE, **changes: Any) -> None:
    """Make the recipe a tuned one."""
    write_json(
        Path("artifacts/quantize/low.json"), {**record, "calibration": {"samples": 4}, **changes}
    )


def write_tuning_set(folder: Path, texts: list[str], pages: list[Path]) -> None:
    (folder / "corpus").mkdir(parents=True)
    lines = [json.dumps({"_id": f"t{i}", "text": text}) for i, text in enumerate(texts)]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    for number, page in enumerate(pages):
        shutil.copyfile(page, folder / f"corpus/other-{number}.png")


def test_what_calibration_and_evaluation_share_is_counted_and_told(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, stem in enumerate(PAGES):  # all different, and of one size
        Image.new("L", (4, 4), number).save(f"data/corpus/{stem}.png")
    Image.new("L", (4, 4), 99).save(project / "unknown.png")
    lines = [json.dumps({"_id": name, "text": f"Total  of {name}"}) for name in QUERIES]
    Path("data/queries.jsonl").write_text("\n".join(lines))
    write_tuning_set(
        Path("tuning"),
        ["total of\tQ1", "total of q4"],
        [Path("data/corpus/b.png"), Path("data/corpus/d.png"), Path("unknown.png")],
    )
    tune()
    run(evaluate.main)
    metrics = json.loads(Path("metrics/quality/low.json").read_text())
    assert metrics["overlap"] == {"same_folder": False, "pages": 2, "queries": 1}
    assert "low: 2 pages and 1 queries are also in the dataset that it was tuned on" in caplog.text


def test_the_same_folder_is_told_of_tuned_recipes_only(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("tuning").symlink_to("data")
    run(evaluate.main)
    assert "tuned on" not in caplog.text
    tune()
    run(evaluate.main)
    overlap = json.loads(Path("metrics/quality/low.json").read_text())["overlap"]
    assert overlap == {"same_folder": True, "pages": len(PAGES), "queries": len(QUERIES)}
    assert "low: measured on the dataset that it was tuned on" in caplog.text


def test_layers_that_tuning_made_worse_are_passed_on(project: Path) -> None:
    Path("tuning").mkdir()
    tune(layers_worse_than_rounding=3)
    run(evaluate.main)
    metrics = json.loads(Path("metrics/quality/low.json").read_text())
    assert metrics["quantization"] == {"layers_worse_than_rounding": 3}


def test_few_queries_are_told(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(evaluate.main)
    assert "data: 3 queries are few; 100 or more can show a small loss" in caplog.text


def test_embeddings_of_other_tokens_are_one_line(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = {**QUANTIZED.pages, "b": torch.ones(4, DIM)}
    write_embeddings(Path("artifacts/embeddings/low.safetensors"), QUANTIZED.queries, pages)
    assert fail(capsys).startswith("error: page 'b' is [5, 6] in the original embeddings")


def test_missing_embeddings_are_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("artifacts/embeddings/low.safetensors").unlink()
    assert fail(capsys).startswith("error: artifacts/embeddings/low.safetensors: cannot be read")


def test_pages_are_read_from_the_file_one_batch_at_a_time(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def record(*args: Any) -> comparison.Comparison:
        given.extend(args)
        return comparison.evaluate(*args)

    monkeypatch.setattr(evaluate, "evaluate", record)
    run(evaluate.main)
    assert all(isinstance(stored.pages, StoredTensors) for stored in given[1:])


def test_metrics_and_verdict_say_how_it_was_served(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = YAML(typ="safe", pure=True).load(Path("params.yaml"))
    params["serving"] = {"low": {"activations": "int8"}}
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    with pytest.raises(SystemExit):  # they are as they were before
        run(evaluate.main)
    said = (
        "is of other activations than params.yaml serving.low asks for; run `dvc repro embed@low`"
    )
    assert said in capsys.readouterr().err
    write_embeddings(
        Path("artifacts/embeddings/low.safetensors"),
        QUANTIZED.queries, QUANTIZED.pages, activations="int8",
    )  # fmt: skip
    run(evaluate.main)
    del params["serving"]
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    with pytest.raises(SystemExit):  # nor are they now what an unlisted recipe has
        run(evaluate.main)
    assert said in capsys.readouterr().err
    metrics = json.loads(Path("metrics/quality/low.json").read_text())
    assert metrics["serving"] == {"activations": "int8"}
    verdict = judge(metrics, GateParams(**params["gate"]))
    assert verdict.reason.endswith("; as served with int8 activations")
