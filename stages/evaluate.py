"""Stage `evaluate@<recipe>`: what quantization did to embeddings, to search, and to size.

This stage is cheap, so it also writes what Git tracks of the expensive `quantize@<recipe>`, whose
own outs are all cached and can be restored by DVC.
"""

from pathlib import Path

from colqwen3.dataset.beir import read_dataset
from colqwen3.embedding.store import read_embeddings
from colqwen3.system.errors import run
from colqwen3.system.files import read_json, write_json
from stages.evaluation.comparison import check_items, evaluate, round_floats
from stages.evaluation.limits import GateParams
from stages.evaluation.sizes import MODEL_KEYS, QUANTIZE_KEYS, compare_sizes, read_bytes
from stages.evaluation.summary import layer_bars, quantize_metrics, summarize
from stages.pipeline.params import EvaluateParams, Sections, load_params
from stages.pipeline.paths import (
    EMBEDDINGS,
    MODEL_METRICS,
    PLOTS,
    QUALITY_METRICS,
    QUANTIZE_METRICS,
    QUANTIZED,
    SUMMARIES,
)
from stages.pipeline.stage import claim, parse_recipe


class Params(Sections):
    """What this stage reads of params.yaml."""

    evaluate: EvaluateParams
    gate: GateParams


def main() -> None:
    """Write metrics and plots of one recipe."""
    recipe = parse_recipe("evaluate", __doc__)
    params = load_params(Params)
    claim(f"evaluate@{recipe}")
    dataset = read_dataset(Path(params.evaluate.dataset))
    original = read_embeddings(EMBEDDINGS / "original.safetensors")
    quantized = read_embeddings(EMBEDDINGS / f"{recipe}.safetensors")
    check_items(dataset, original, quantized)
    metrics, points = evaluate(dataset, original, quantized)
    record_path, fix = QUANTIZED / f"{recipe}.json", f"run `dvc repro quantize@{recipe}`"
    record = read_json(record_path, fix)
    metrics["size"] = compare_sizes(
        read_bytes(MODEL_METRICS, MODEL_KEYS, "run `dvc repro inspect`"),
        read_bytes(record_path, QUANTIZE_KEYS, fix),
    )
    write_json(PLOTS / recipe / "scores.json", round_floats(points))
    write_json(PLOTS / recipe / "layers.json", layer_bars(record))
    write_json(QUANTIZE_METRICS / f"{recipe}.json", quantize_metrics(record))
    write_json(QUALITY_METRICS / f"{recipe}.json", round_floats(metrics))
    write_json(SUMMARIES / f"{recipe}.json", summarize(metrics, params.gate))


if __name__ == "__main__":
    run(main)
