"""A recipe's headline figures, one row of ``dvc metrics show``, and figures for plots."""

from collections.abc import Mapping
from typing import Any

from stages.evaluation.limits import GateParams, judge

DECIMALS = 5  # a row must fit a screen; metrics/quality/<recipe>.json has more


def summarize(metrics: Mapping[str, Any], gate: GateParams) -> dict[str, Any]:
    """Return what a reader compares first, from the metrics of a recipe, flat and short.

    ``cos_query`` and ``cos_page`` are the mean cosines of tokens; ``ndcg5`` is nDCG@5 of the
    quantized model, ``ndcg5_orig`` of the original and ``ndcg5_mixed`` of quantized queries on the
    original's pages; ``recall1`` is the quantized model's; ``top1_same`` is the share of queries
    whose first page stayed; ``mb`` is the size of the checkpoint's weight files in 10^6 bytes;
    ``verdict`` is that of `judge`.

    Raises
    ------
    KeyError
        If the metrics lack a figure.
    """
    retrieval, mixed = metrics["retrieval"], metrics["mixed_index"]
    figures = {
        "cos_page": metrics["pages"]["cosine"]["mean"],
        "cos_query": metrics["queries"]["cosine"]["mean"],
        "mb": metrics["size"]["files"]["quantized"] / 1e6,
        "ndcg5": retrieval["ndcg_at_5"]["quantized"],
        "ndcg5_mixed": mixed["ndcg_at_5"]["quantized"],
        "ndcg5_orig": retrieval["ndcg_at_5"]["original"],
        "recall1": retrieval["recall_at_1"]["quantized"],
        "top1_same": retrieval["top1_agreement"],
    }
    return {
        **{name: round(float(value), DECIMALS) for name, value in figures.items()},
        "verdict": judge(metrics, gate).verdict,
    }


def layer_bars(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the relative weight error of each linear, a bar each, in the order of the layers.

    Parameters
    ----------
    record
        ``artifacts/quantize/<recipe>.json``.
    """
    return [
        {"layer": layer, "error": error} for layer, error in record["relative_weight_error"].items()
    ]


def quantize_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a quantization with the errors of its linears as mean and maximum."""
    errors = list(record["relative_weight_error"].values())
    return {
        **record,
        "relative_weight_error": {
            "mean": round(sum(errors) / len(errors), 6),
            "max": round(max(errors), 6),
        },
    }


def ndcg_bars(summaries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return nDCG@5 of each recipe's original, quantized model and mixed index, a bar each.

    ``bar`` labels a bar, since the templates of DVC know one label only.

    Raises
    ------
    KeyError
        If a summary lacks a figure.
    """
    models = {"original": "ndcg5_orig", "quantized": "ndcg5", "mixed index": "ndcg5_mixed"}
    return [
        {
            "bar": f"{recipe}: {model}",
            "recipe": recipe,
            "model": model,
            "ndcg_at_5": summary[key],
        }
        for recipe, summary in summaries.items()
        for model, key in models.items()
    ]
