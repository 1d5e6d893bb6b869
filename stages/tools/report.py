"""Command `make report`: all results in one HTML file, artifacts/report/index.html, that opens offline.

`python -m stages.tools.report` reads what the stages wrote under metrics/ and artifacts/. Pictures
are inlined; nothing is fetched, and equal results give an equal file. Timings are those of this
machine, or absent.
"""

import argparse
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from colqwen3.dataset.beir import read_queries
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_file
from stages.checking.params import Params
from stages.evaluation.changes import Result as QueryResult
from stages.evaluation.changes import find_changed
from stages.evaluation.limits import GateParams, Verdict, judge
from stages.evaluation.speed import read_speed
from stages.evaluation.summary import loss, loss_bars, ndcg_bars, rank_bars, summarize
from stages.pipeline.params import load_params
from stages.pipeline.paths import (
    CHECKPOINTS,
    HEATMAPS,
    METRICS,
    PLOTS,
    QUALITY_METRICS,
    QUANTIZE_METRICS,
    QUERY_METRICS,
    REPORT,
    SENSITIVITY_PLOT,
)
from stages.tools.charts import (
    layers_chart,
    loss_chart,
    ndcg_chart,
    outputs_chart,
    ranks_chart,
    scores_chart,
    sensitivity_chart,
    spread,
    svg,
)

TEMPLATE = "report.html.jinja"
SIDES = ("original", "quantized")
MOVED = 5  # queries to list per recipe
LISTED = 100  # changed queries to list per recipe
TERMS = (
    "Loss: 1 - mean cosine of the quantized model's tokens with the original's. Mixed index: "
    "quantized queries search the original's page embeddings, the index that a user already has. "
    "Margin: score of the best relevant page minus that of the best other page. Intervals: paired "
    "bootstrap over queries."
)
WEIGHTS = (
    "The norm of what quantization changed in a weight, divided by the norm of the weight. A tuned "
    "layer's is larger than that of rounding, and that is no fault: rounding to nearest has the "
    "smallest error that a weight can have, while tuning lets single weights go further from the "
    "original so that the errors cancel in the layer's output, which is what counts."
)
SENSITIVITIES = (
    "1 - mean cosine of tokens when this part alone is rounded to so many bits, on calibration "
    "samples. Budgets are spent by it."
)
OUTPUTS = (
    "The error of each decoder layer's output on the calibration samples: what tuning minimises. "
    "Where rounding came out better, the layer was left rounded. Tuning end to end, if a recipe asks "
    "for it, comes after and is not in these."
)


@dataclass(frozen=True)
class Result:
    """What the stages wrote about one recipe.

    Attributes
    ----------
    metrics
        ``metrics/quality/<recipe>.json``.
    quantization
        ``metrics/quantize/<recipe>.json``.
    queries
        Of ``metrics/queries/<recipe>.json``.
    speed
        Timings of this checkpoint on this machine; None if there are none.
    layers, scores
        Points of ``metrics/plots/<recipe>``.
    heatmap
        The PNG of the most changed query.
    pictures
        The PNG of a query that got worse, by its id, the worst first.
    verdict
        Of the metrics under the gate's limits.
    """

    metrics: Mapping[str, Any]
    quantization: Mapping[str, Any]
    queries: Sequence[QueryResult]
    speed: Mapping[str, Any] | None
    layers: Sequence[Mapping[str, Any]]
    scores: Sequence[Mapping[str, Any]]
    heatmap: bytes
    pictures: Mapping[str, bytes]
    verdict: Verdict


def read_result(recipe: str, gate: GateParams) -> Result:
    """Read the files of a recipe.

    Raises
    ------
    UserError
        If one is missing, damaged, or lacks a figure of the gate.
    """
    evaluate = f"run `dvc repro evaluate@{recipe}`"
    path, queries = QUALITY_METRICS / f"{recipe}.json", QUERY_METRICS / f"{recipe}.json"
    metrics = read_json(path, evaluate)
    try:
        verdict = judge(metrics, gate)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: lacks a figure of the gate ({error}); {evaluate}") from None
    try:
        results = read_json(queries, evaluate)["queries"]
    except (KeyError, TypeError):
        raise UserError(f"{queries}: has no queries; {evaluate}") from None
    return Result(
        metrics=metrics,
        quantization=read_json(QUANTIZE_METRICS / f"{recipe}.json", evaluate),
        queries=results,
        speed=read_speed(recipe, CHECKPOINTS / recipe),
        layers=read_json(PLOTS / recipe / "layers.json", evaluate),
        scores=read_json(PLOTS / recipe / "scores.json", evaluate),
        heatmap=_read_picture(PLOTS / recipe / "heatmap.png", recipe),
        pictures=_read_pictures(recipe),
        verdict=verdict,
    )


def _read_pictures(recipe: str) -> dict[str, bytes]:
    """Return the pictures of the stage `heatmap` by query."""
    path = HEATMAPS / recipe / "index.json"
    index = read_json(path, f"run `dvc repro heatmap@{recipe}`")
    try:
        names = {entry["query"]: Path(entry["file"]).name for entry in index}
    except (KeyError, TypeError):
        raise UserError(f"{path}: is damaged; run `dvc repro -f heatmap@{recipe}`") from None
    return {query: _read_picture(path.with_name(name), recipe) for query, name in names.items()}


def _read_picture(path: Path, recipe: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); run `dvc repro heatmap@{recipe}`"
        ) from None


def headline(result: Result) -> dict[str, str]:
    """Return a recipe's column of the first table: its figures as text, by their names.

    Raises
    ------
    KeyError, TypeError
        If the results lack a figure.
    """
    queries, pages = result.metrics["queries"], result.metrics["pages"]
    retrieval, mixed = result.metrics["retrieval"], result.metrics["mixed_index"]
    size, first = result.metrics["size"]["files"], retrieval["first_pages"]
    return {
        "Weight files: original → quantized": (
            f"{size['original']:,} → {size['quantized']:,} bytes"
        ),
        "Weight files: reduction": f"{size['reduction_percent']:.1f} %",
        "Loss of page tokens": f"{loss(pages['cosine']['mean']):.6f}",
        "Loss of query tokens": f"{loss(queries['cosine']['mean']):.6f}",
        "Cosine of page tokens: mean (1st percentile)": _cosine(pages["cosine"]),
        "Cosine of query tokens: mean (1st percentile)": _cosine(queries["cosine"]),
        "Queries whose first page changed": (
            f"{_share(first['changed'], result)}; "
            f"this many queries allow up to {100 * first['changed_share_at_most']:.1f} %"
        ),
        "Best relevant page ranked lower": _share(first["ranked_lower"], result),
        "Best relevant page ranked higher": _share(first["ranked_higher"], result),
        "nDCG@5: original → quantized": _both(retrieval["ndcg_at_5"]),
        "nDCG@5: change (95 % interval)": _change(retrieval["ndcg_at_5"]),
        "nDCG@5: mixed index": f"{mixed['ndcg_at_5']['quantized']:.3f}",
        "Recall@1: original → quantized": _both(retrieval["recall_at_1"]),
        "Margin: change (95 % interval)": _change(retrieval["margin"]),
        **_latencies(result.speed),
    }


def _latencies(speed: Mapping[str, Any] | None) -> dict[str, str]:
    figures = dict.fromkeys(("Latency, query", "Latency, page"), "not measured on this machine")
    if speed is None:
        return {**figures, "Latency measured on": "run `dvc repro -f benchmark`"}
    for kind in ("query", "page"):
        batches = speed[kind]["batches"]
        smallest = min(batches, key=int)
        times = batches[smallest]["best"]
        figures[f"Latency, {kind}"] = (
            f"batch {smallest}: {times['original_ms']:.1f} → {times['quantized_ms']:.1f} ms"
            f" (speed-up {times['speedup']:.2f})"
        )
    setting = speed["setting"]
    figures["Latency measured on"] = (
        f"{setting['device']}, {setting['threads']} threads, {setting['date']}, "
        f"{setting['dtype']}, kernel: {setting['kernel']}, torch {setting['torch']}"
    )
    return figures


def _cosine(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.6f} ({figure['p01']:.6f})"


def _both(figure: Mapping[str, float]) -> str:
    return f"{figure['original']:.3f} → {figure['quantized']:.3f}"


def _change(figure: Mapping[str, float]) -> str:
    return f"{figure['difference']:+.3f} ({figure['low']:+.3f} … {figure['high']:+.3f})"


def _share(count: int, result: Result) -> str:
    queries = result.metrics["data"]["queries"]
    return f"{count} of {queries} ({100 * count / queries:.1f} %)"


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


def describe_recipe(name: str, result: Result, queries: Mapping[str, str]) -> dict[str, Any]:
    """Return what the template shows of one recipe beside the table of figures."""
    changed = find_changed(result.queries)
    first = result.metrics["retrieval"]["first_pages"]
    drawn = [
        {
            "name": query["query"],
            "text": queries.get(query["query"], ""),
            "change": f"rank of the best relevant page {_ranks(query)}",
            "image": inline("png", result.pictures[query["query"]]),
        }
        for query in changed
        if query["query"] in result.pictures
    ]
    rest = len(changed) - LISTED
    return {
        "name": name,
        "verdict": result.verdict.verdict,
        "reasons": result.verdict.breaches or [result.verdict.reason],
        "heatmap": inline("png", result.heatmap),
        "changes": (
            f"{_share(first['changed'], result)} first pages changed; the best relevant page is "
            f"ranked lower for {first['ranked_lower']} queries, higher for {first['ranked_higher']}"
        ),
        "drawn": drawn,
        "changed": [
            [query["query"], queries.get(query["query"], ""), _ranks(query), _first_pages(query)]
            for query in changed[:LISTED]
        ],
        "more": f"{rest} more are in {QUERY_METRICS / name}.json." if rest > 0 else "",
    }


def _ranks(query: QueryResult) -> str:
    return f"{query['original']['rank']} → {query['quantized']['rank']}"


def _first_pages(query: QueryResult) -> str:
    before, after = query["original"]["first"], query["quantized"]["first"]
    return before if before == after else f"{before} → {after}"


def read_sensitivity() -> list[dict[str, Any]]:
    """Return the rows of the sensitivity plot, none if it was not measured."""
    if not SENSITIVITY_PLOT.exists():
        return []
    rows: list[dict[str, Any]] = read_json(SENSITIVITY_PLOT, "run `dvc repro sensitivity`")
    return rows


def draw_charts(
    results: Mapping[str, Result], gate: GateParams, sensitivity: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the charts with their titles and what must be known to read them."""
    rows = {recipe: summarize(result.metrics, gate) for recipe, result in results.items()}
    scores = {recipe: result.scores for recipe, result in results.items()}
    layers = {recipe: result.layers for recipe, result in results.items()}
    errors = {
        recipe: result.quantization["layer_errors"]
        for recipe, result in results.items()
        if result.quantization.get("layer_errors")
    }
    score_range = spread(
        point[side] for points in scores.values() for point in points for side in SIDES
    )
    error_range = spread(point["error"] for points in layers.values() for point in points)
    charts = [
        (
            "Loss by recipe",
            "1 - mean cosine of the quantized model's tokens with the original's; less is better.",
            [loss_chart(loss_bars(rows))],
        ),
        (
            "Changed ranks by recipe",
            "Queries whose best relevant page is now ranked lower or higher.",
            [ranks_chart(rank_bars(rows))],
        ),
        (
            "Score of each query with its best relevant page",
            "On the grey line both models give the same score.",
            [scores_chart({recipe: scores[recipe]}, score_range) for recipe in scores],
        ),
        (
            "Relative error of each quantized weight",
            WEIGHTS,
            [layers_chart({recipe: layers[recipe]}, error_range) for recipe in layers],
        ),
        (
            "nDCG@5 by recipe",
            "Where the bars look alike, the interval of the change in the table says more.",
            [ndcg_chart(ndcg_bars(rows))],
        ),
    ]
    if errors:
        charts.insert(
            3,
            (
                "Output error of each tuned layer",
                OUTPUTS,
                [outputs_chart({recipe: errors[recipe]}) for recipe in errors],
            ),
        )
    if sensitivity:
        charts.append(
            (
                "Sensitivity of each part",
                SENSITIVITIES,
                [sensitivity_chart(sensitivity, kind) for kind in ("pages", "queries")],
            )
        )
    return [
        {
            "title": title,
            "text": text,
            "images": [inline("svg+xml", svg(chart).encode()) for chart in drawn],
        }
        for title, text, drawn in charts
    ]


def inline(kind: str, data: bytes) -> str:
    """Return a picture of MIME type image/`kind` as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render(params: Params, results: Mapping[str, Result], queries: Mapping[str, str]) -> str:
    """Return the HTML of all results; everything that is data is escaped.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the results lack a figure.
    """
    data = next(iter(results.values())).metrics["data"]
    model = " at revision ".join(filter(None, [params.model.source, params.model.revision]))
    columns = {recipe: headline(result) for recipe, result in results.items()}
    names = list(next(iter(columns.values())))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(TEMPLATE).render(
        title=f"What quantization did to {model}",
        measured=(
            f"Model: {model}. Dataset: {params.evaluate.dataset} ({data['queries']} queries, "
            f"{data['pages']} pages). Embeddings: {params.embed.dtype}, device: "
            f"{params.compute.device}."
        ),
        recipes=[describe_recipe(name, result, queries) for name, result in results.items()],
        figures=[[name, *(column[name] for column in columns.values())] for name in names],
        terms=TERMS,
        charts=draw_charts(results, params.gate, read_sensitivity()),
        moved=most_moved(results, queries),
        params=yaml.safe_dump(params.model_dump(), sort_keys=False, allow_unicode=True),
    )


def main() -> None:
    """Write the report on the recipes of params.yaml."""
    argparse.ArgumentParser(prog="python -m stages.tools.report", description=__doc__).parse_args()
    params = load_params(Params)
    evaluated = [name for name in params.recipes if (QUALITY_METRICS / f"{name}.json").exists()]
    for name in params.recipes.keys() - set(evaluated):
        print(f"{name}: not evaluated, so not in the report")
    results = {name: read_result(name, params.gate) for name in evaluated or params.recipes}
    queries = read_queries(Path(params.evaluate.dataset) / "queries.jsonl")
    try:
        text = render(params, results, queries)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{METRICS}: lacks a figure ({error}); run `dvc repro`") from None
    write_file(REPORT / "index.html", text.encode())


if __name__ == "__main__":
    run(main)
