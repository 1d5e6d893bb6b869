"""Stage `evaluate@<recipe>`: what quantization did to embeddings, to search, and to size.

This stage is cheap, so it also writes what Git tracks of the expensive `quantize@<recipe>`, whose
own outs are all cached and can be restored by DVC.
"""

import logging
from pathlib import Path
from typing import Any

from pydantic import Field

from colqwen3.dataset.beir import Dataset, read_dataset
from colqwen3.embedding.store import open_embeddings
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_json
from stages.evaluation.comparison import check_items, evaluate, round_figures, round_points
from stages.evaluation.index import compare_formats
from stages.evaluation.limits import FEW_QUERIES, GateParams, describe_sharing
from stages.evaluation.sharing import NOTHING_SHARED, find_shared
from stages.evaluation.sizes import MODEL_KEYS, QUANTIZE_KEYS, compare_sizes, read_bytes
from stages.evaluation.summary import layer_bars, quantize_metrics, summarize
from stages.pipeline.params import EvaluateParams, Sections, ServingOptions, load_params
from stages.pipeline.paths import (
    EMBEDDINGS,
    INDEX_METRICS,
    MODEL_METRICS,
    PLOTS,
    QUALITY_METRICS,
    QUANTIZE_METRICS,
    QUANTIZED,
    QUERY_METRICS,
    SUMMARIES,
)
from stages.pipeline.stage import claim, parse_recipe

logger = logging.getLogger(__name__)


class CalibrationSource(Sections):
    """The folder of calibration data; evaluation depends on nothing else of that section."""

    dataset: str


class Params(Sections):
    """What this stage reads of params.yaml."""

    calibration: CalibrationSource
    evaluate: EvaluateParams
    gate: GateParams
    serving: dict[str, ServingOptions] = Field(default_factory=dict)


def compare_datasets(dataset: Dataset, params: Params, record: dict[str, Any]) -> dict[str, Any]:
    """Return what the dataset shares with that of calibration, if the recipe was tuned at all."""
    if not record["calibration"]["samples"]:
        return NOTHING_SHARED
    return find_shared(dataset, Path(params.evaluate.dataset), Path(params.calibration.dataset))


def main() -> None:
    """Write metrics and plots of one recipe."""
    recipe = parse_recipe("evaluate", __doc__)
    params = load_params(Params)
    claim(f"evaluate@{recipe}")
    dataset = read_dataset(Path(params.evaluate.dataset))
    original = open_embeddings(EMBEDDINGS / "original.safetensors")
    quantized = open_embeddings(EMBEDDINGS / f"{recipe}.safetensors")
    check_items(dataset, original, quantized)
    served = params.serving.get(recipe)
    if quantized.activations != (served and served.activations):
        raise UserError(
            f"{EMBEDDINGS / recipe}.safetensors: is of other activations than "
            f"params.yaml serving.{recipe} asks for; run `dvc repro embed@{recipe}`"
        )
    record_path, fix = QUANTIZED / f"{recipe}.json", f"run `dvc repro quantize@{recipe}`"
    record = read_json(record_path, fix)
    size = compare_sizes(
        read_bytes(MODEL_METRICS, MODEL_KEYS, "run `dvc repro inspect`"),
        read_bytes(record_path, QUANTIZE_KEYS, fix),
    )
    try:
        layers, quantization = layer_bars(record), quantize_metrics(record)
        overlap = compare_datasets(dataset, params, record)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{record_path}: lacks a figure ({error}); {fix}") from None
    comparison = evaluate(dataset, original, quantized)
    metrics = round_figures(
        {
            **comparison.metrics,
            "size": size,
            "overlap": overlap,
            **({"serving": served.model_dump()} if served else {}),
            "quantization": {
                "layers_worse_than_rounding": record.get("layers_worse_than_rounding", 0)
            },
        }
    )
    if shared := describe_sharing(metrics):
        logger.warning("%s: %s; its figures flatter it", recipe, shared)
    if len(dataset.queries) < FEW_QUERIES:
        logger.warning(
            "%s: %d queries are few; %d or more can show a small loss",
            params.evaluate.dataset, len(dataset.queries), FEW_QUERIES,
        )  # fmt: skip
    formats = compare_formats(dataset, original, quantized, params.evaluate.index)
    write_json(INDEX_METRICS / f"{recipe}.json", round_figures({"formats": formats}))
    write_json(PLOTS / recipe / "scores.json", round_points(comparison.points))
    write_json(PLOTS / recipe / "layers.json", layers)
    write_json(QUANTIZE_METRICS / f"{recipe}.json", quantization)
    write_json(QUERY_METRICS / f"{recipe}.json", {"queries": comparison.results})
    write_json(QUALITY_METRICS / f"{recipe}.json", metrics)
    write_json(SUMMARIES / f"{recipe}.json", summarize(metrics, params.gate))


if __name__ == "__main__":
    run(main)
