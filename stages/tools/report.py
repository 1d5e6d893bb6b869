"""Command `make report`: all results in one HTML file, artifacts/report/index.html, that opens offline.

`python -m stages.tools.report` reads what the other stages wrote under metrics/. Pictures are inlined;
nothing is fetched, and equal results give an equal file.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from colqwen3.dataset.beir import read_queries
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json
from stages.checking.params import Params
from stages.evaluation.limits import GateParams, find_breaches
from stages.evaluation.summary import summarize
from stages.pipeline.params import load_params
from stages.pipeline.paths import METRICS, PLOTS, SPEED_METRICS
from stages.summary import ndcg_bars
from stages.tools.charts import layers_chart, ndcg_chart, scores_chart, svg
from stages.tools.html import document, heading, image, paragraph, preformatted, table

REPORT = Path("artifacts/report/index.html")
MOVED = 5  # queries to list a recipe
TERMS = (
    "Mixed index: quantized queries search the original's page embeddings, the index that a user "
    "already has. Margin: score of the best relevant page minus that of the best other page. "
    "Intervals: paired bootstrap over queries."
)


@dataclass(frozen=True)
class Result:
    """What the stages wrote about one recipe."""

    metrics: Mapping[str, Any]
    speed: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]
    scores: Sequence[Mapping[str, Any]]
    heatmap: bytes
    breaches: Sequence[str]


def read_result(recipe: str, gate: GateParams) -> Result:
    """Read the files of a recipe.

    Raises
    ------
    UserError
        If one is missing, damaged, or lacks a figure of the gate.
    """
    path, picture = METRICS / f"{recipe}.json", PLOTS / recipe / "heatmap.png"
    metrics = read_json(path, f"run `dvc repro evaluate@{recipe}`")
    try:
        heatmap = picture.read_bytes()
        breaches = find_breaches(metrics, gate)
    except OSError as error:
        raise UserError(
            f"{picture}: cannot be read ({error.strerror}); run `dvc repro heatmap@{recipe}`"
        ) from None
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: lacks a figure of the gate ({error}); run `dvc repro evaluate@{recipe}`"
        ) from None
    return Result(
        metrics=metrics,
        speed=read_json(SPEED_METRICS / f"{recipe}.json", f"run `dvc repro benchmark@{recipe}`"),
        layers=read_json(PLOTS / recipe / "layers.json", f"run `dvc repro quantize@{recipe}`"),
        scores=read_json(PLOTS / recipe / "scores.json", f"run `dvc repro evaluate@{recipe}`"),
        heatmap=heatmap,
        breaches=breaches,
    )


def headline(result: Result) -> dict[str, str]:
    """Return a recipe's column of the first table: its figures as text, by their names.

    Raises
    ------
    KeyError, TypeError
        If the results lack a figure.
    """
    queries, pages = result.metrics["queries"], result.metrics["pages"]
    retrieval, mixed = result.metrics["retrieval"], result.metrics["mixed_index"]
    size, setting = result.metrics["size"]["files"], result.speed["setting"]
    figures = {
        "Grade (flattened cosine of queries)": f"{queries['grade']} ({queries['flattened_cosine']:.4f})",
        "Cosine of query tokens: mean (1st percentile)": _cosine(queries["cosine"]),
        "Cosine of page tokens: mean (1st percentile)": _cosine(pages["cosine"]),
        "nDCG@5: original → quantized": _both(retrieval["ndcg_at_5"]),
        "nDCG@5: change (95 % interval)": _change(retrieval["ndcg_at_5"]),
        "nDCG@5: mixed index": f"{mixed['ndcg_at_5']['quantized']:.3f}",
        "Recall@1: original → quantized": _both(retrieval["recall_at_1"]),
        "Same first page (top-1 agreement)": f"{100 * retrieval['top1_agreement']:.1f} %",
        "Margin: change (95 % interval)": _change(retrieval["margin"]),
        "Weight files: original → quantized": (
            f"{size['original']:,} → {size['quantized']:,} bytes"
        ),
        "Weight files: reduction": f"{size['reduction_percent']:.1f} %",
    }
    for kind in ("query", "page"):
        batches = result.speed[kind]["batches"]
        least = min(batches, key=int)
        times = batches[least]["best"]
        figures[f"Latency, {kind}, batch {least}: original → quantized"] = (
            f"{times['original_ms']:.1f} → {times['quantized_ms']:.1f} ms"
            f" (speed-up {times['speedup']:.2f})"
        )
    figures["Latency measured on"] = (
        f"{setting['device']}, threads: {setting['threads']}, "
        f"{setting['dtype']}, kernel: {setting['kernel']}, torch {setting['torch']}"
    )
    figures["Gate"] = "; ".join(result.breaches) or "within every limit"
    return figures


def _cosine(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.4f} ({figure['p01']:.4f})"


def _both(figure: Mapping[str, float]) -> str:
    return f"{figure['original']:.3f} → {figure['quantized']:.3f}"


def _change(figure: Mapping[str, float]) -> str:
    return f"{figure['difference']:+.3f} ({figure['low']:+.3f} … {figure['high']:+.3f})"


def most_moved(results: Mapping[str, Result], queries: Mapping[str, str]) -> list[list[str]]:
    """Return, by recipe, the queries whose score with their best relevant page moved most."""
    rows = []
    for recipe, result in results.items():
        scores = sorted(result.scores, key=lambda point: -abs(_moved(point)))
        for point in scores[:MOVED]:
            name = point["query"]
            both = f"{point['original']:.3f} → {point['quantized']:.3f}"
            rows.append([recipe, name, queries.get(name, ""), both, f"{_moved(point):+.3f}"])
    return rows


def _moved(point: Mapping[str, Any]) -> float:
    return float(point["quantized"] - point["original"])


def render(params: Params, results: Mapping[str, Result], queries: Mapping[str, str]) -> str:
    """Return the HTML of all results; everything that is data is escaped."""
    data = next(iter(results.values())).metrics["data"]
    model = " at revision ".join(filter(None, [params.model.source, params.model.revision]))
    measured = (
        f"Model: {model}. Dataset: {params.evaluate.dataset} ({data['queries']} queries, "
        f"{data['pages']} pages). Embeddings: {params.embed.dtype}, device: {params.compute.device}."
    )
    columns = {recipe: headline(result) for recipe, result in results.items()}
    names = list(next(iter(columns.values())))
    bars = ndcg_bars({recipe: summarize(result.metrics) for recipe, result in results.items()})
    charts = {
        "nDCG@5 by recipe": ndcg_chart(bars),
        "Score of each query with its best relevant page": scores_chart(
            {recipe: result.scores for recipe, result in results.items()}
        ),
        "Relative error of each quantized weight": layers_chart(
            {recipe: result.layers for recipe, result in results.items()}
        ),
    }
    parts = [
        heading("What quantization did", 1),
        table(
            ["", *results],
            [[name, *(column[name] for column in columns.values())] for name in names],
            measured,
        ),
        paragraph(TERMS),
    ]
    for title, chart in charts.items():
        parts += [heading(title), image("svg+xml", svg(chart).encode(), title, measured)]
    parts.append(heading("Where the most changed query matches its page"))
    for recipe, result in results.items():
        parts.append(image("png", result.heatmap, f"Heat map of recipe {recipe}", measured))
    parts += [
        heading("Queries whose score moved most"),
        table(
            ["Recipe", "Query", "Text", "Original → quantized", "Change"],
            most_moved(results, queries),
            measured,
        ),
        heading("Parameters"),
        preformatted(yaml.safe_dump(params.model_dump(), sort_keys=False, allow_unicode=True)),
    ]
    return document(f"Quantization of {model}", parts)


def main() -> None:
    """Write the report on the recipes of params.yaml."""
    argparse.ArgumentParser(prog="python -m stages.tools.report", description=__doc__).parse_args()
    params = load_params()
    results = {recipe: read_result(recipe, params.gate) for recipe in params.recipes}
    queries = read_queries(Path(params.evaluate.dataset) / "queries.jsonl")
    try:
        text = render(params, results, queries)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{METRICS}: lacks a figure ({error}); run `dvc repro`") from None
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    # by rename, so that a half-written file is never taken for a whole one
    partial = REPORT.with_name(REPORT.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, REPORT)


if __name__ == "__main__":
    run(main)
