"""The committed table of engines: whole, within its limits, and what card and documentation tell of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.publishing.engines import (
    RUNTIME_LOSSES,
    RUNTIME_SPEEDS,
    TRANSFORMERS_VERSIONS,
    VLLM_VERSIONS,
)

FOLDER = Path("metrics/engines")
TABLES: dict[str, Any] = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
FORMATS = {"auto_round", "auto_gptq", "llm_compressor"}


def vllm(**wanted: Any) -> list[dict[str, Any]]:
    return [
        row
        for row in TABLES["vllm"]["rows"]
        if all(row[key] == value for key, value in wanted.items())
    ]


def test_every_engine_has_a_table_that_says_of_what_and_when() -> None:
    assert TABLES.keys() == {"transformers", "mteb", "colpali-engine", "vllm"}
    for table in TABLES.values():
        assert table["of"] == "demo model (5.8 million parameters), CPU"
        assert table["versions"]
        assert len(table["date"]) == 10
        assert table["rows"]


def test_every_format_runs_in_vllm_offline_and_served() -> None:
    versions = sorted({row["version"] for row in TABLES["vllm"]["rows"]})
    assert ", ".join(versions) == VLLM_VERSIONS
    for version in versions:
        for kind in FORMATS:
            (row,) = vllm(version=version, format=kind, mode="offline", plugin=False)
            assert row["result"] == "runs"
    for kind in FORMATS:
        (row,) = vllm(format=kind, mode="server")
        assert (row["result"], row["card"]) == ("runs", "expected numbers")
        for loss in ("query_loss", "page_loss"):
            assert row[loss] <= 1.3 * row[f"{loss}_of_transformers"]
    rows = vllm(format="original", dtype="float32")
    assert {row["mode"] for row in rows} == {"offline", "server"}
    assert min(row[key] for row in rows for key in ("query_minimum", "page_minimum")) >= 0.9999


@pytest.mark.parametrize("kind", ["original", "auto_round"])
def test_no_folder_without_its_bias_was_loaded(kind: str) -> None:
    for bias in ("removed", "after"):
        rows = vllm(format=f"{kind}, bias {bias}")
        assert rows
        assert all(row["result"].startswith("rejected: ") for row in rows)
    assert all(row["result"] == "runs" for row in vllm(format=f"{kind}, bias before"))


def test_the_plugin_corrects_what_stock_vllm_does_to_published_folders() -> None:
    for row in vllm(format="published", plugin=True):
        assert min(row["query_minimum"], row["page_minimum"]) >= 0.9999
    assert all(row["page_loss"] > 1e-4 for row in vllm(format="published", plugin=False))


def test_what_a_card_says_of_the_runtime_was_measured() -> None:
    speed = json.loads(Path("metrics/size/serving-cuda.json").read_text())["steps"]["speed"]
    for told, ratios in RUNTIME_SPEEDS.items():
        count, kind = told.split()[:2]
        kind = {"queries": "query", "pages": "page"}.get(kind, kind)
        if count == "1":
            assert told == f"1 {kind} of {speed[kind]['tokens']:,} tokens"
        best = speed[kind]["batches"][count]["best"]
        assert ratios == (round(best["speedup"], 2), round(best["speedup_int8"], 2))
    files = ("activations-demo", "activations-39m")
    for file, told in zip(files, RUNTIME_LOSSES, strict=True):
        recipes = json.loads(Path(f"metrics/scale/{file}.json").read_text())["loss"].values()
        for kind, ratio in zip(("pages", "queries"), RUNTIME_LOSSES[told], strict=True):
            worst = max(
                losses["int8"][name][kind] / plain[kind]
                for losses in recipes
                for name, plain in losses["bfloat16"].items()
            )
            assert f"{worst:.2f}" == f"{ratio:.2f}"


def test_the_others_agree() -> None:
    rows = TABLES["transformers"]["rows"]
    assert TRANSFORMERS_VERSIONS.keys() == FORMATS
    for kind, told in TRANSFORMERS_VERSIONS.items():
        ran = {row["version"] for row in rows if row["format"] == kind and row["result"] == "runs"}
        assert ran == set(told.split(" and "))
    assert all(row["minimum"] >= 0.99999 for row in rows if row["result"] == "runs")
    for row in TABLES["mteb"]["rows"]:
        assert row["ndcg_at_5"] == pytest.approx(row["ndcg_at_5_of_evaluate"], abs=2e-4)
    for row in TABLES["colpali-engine"]["rows"]:
        assert min(row["query_minimum"], row["page_minimum"]) >= 0.9999
        tokens, pooled = row["pooled"]
        assert pooled < tokens
