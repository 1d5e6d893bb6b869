"""A recipe's headline figures, one row of ``dvc metrics show``, and figures for plots."""

from collections.abc import Mapping
from typing import Any

from stages.evaluation.limits import GateParams, judge

LOSS_DECIMALS = 6
MB_DECIMALS = 5


def summarize(metrics: Mapping[str, Any], gate: GateParams) -> dict[str, Any]:
    """Return what a reader compares first, from the metrics of a recipe, flat and short.

    Figures stand here as they stand in ``metrics/quality/<recipe>.json``: rounded again, the two
    could differ where they are shown.

    Parameters
    ----------
    metrics
        ``metrics/quality/<recipe>.json``.
    gate
        The limits.

    Returns
    -------
    dict
        ``cos_query`` and ``cos_page`` are the mean cosines of tokens; ``ndcg5`` is nDCG@5 of the
        quantized model, ``ndcg5_orig`` of the original and ``ndcg5_mixed`` of quantized queries on
        the original's pages; ``recall1`` is the quantized model's; ``top1_same`` is the share of
        queries whose first page stayed; ``lower`` and ``higher`` are the numbers of queries whose
        best relevant page fell and rose; ``mb`` is the size of the checkpoint's weight files in
        10^6 bytes; ``verdict`` is that of `judge`.

    Raises
    ------
    KeyError, TypeError
        If the metrics lack a figure.
    """
    retrieval, mixed = metrics["retrieval"], metrics["mixed_index"]
    figures = {
        "cos_page": metrics["pages"]["cosine"]["mean"],
        "cos_query": metrics["queries"]["cosine"]["mean"],
        "mb": round(metrics["size"]["files"]["quantized"] / 1e6, MB_DECIMALS),
        "ndcg5": retrieval["ndcg_at_5"]["quantized"],
        "ndcg5_mixed": mixed["ndcg_at_5"]["quantized"],
        "ndcg5_orig": retrieval["ndcg_at_5"]["original"],
        "recall1": retrieval["recall_at_1"]["quantized"],
        "top1_same": retrieval["top1_agreement"],
    }
    first = retrieval["first_pages"]
    return {
        **{name: float(value) for name, value in figures.items()},
        "lower": first["ranked_lower"],
        "higher": first["ranked_higher"],
        "verdict": judge(metrics, gate).verdict,
    }


def loss(cosine: float) -> float:
    """Return what is missing to a cosine of 1, without the noise of the subtraction."""
    return round(1 - cosine, LOSS_DECIMALS)


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
        {"bar": f"{recipe}: {model}", "recipe": recipe, "model": model, "ndcg_at_5": summary[key]}
        for recipe, summary in summaries.items()
        for model, key in models.items()
    ]


def loss_bars(summaries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the loss (1 - mean cosine) of each recipe's page and query tokens, a bar each.

    Raises
    ------
    KeyError
        If a summary lacks a figure.
    """
    kinds = {"pages": "cos_page", "queries": "cos_query"}
    return [
        {"bar": f"{recipe}: {kind}", "recipe": recipe, "kind": kind, "loss": loss(summary[key])}
        for recipe, summary in summaries.items()
        for kind, key in kinds.items()
    ]


def rank_bars(summaries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the numbers of queries whose best relevant page fell and rose, a bar each.

    Raises
    ------
    KeyError
        If a summary lacks a figure.
    """
    return [
        {"bar": f"{recipe}: {way}", "recipe": recipe, "way": way, "queries": summary[way]}
        for recipe, summary in summaries.items()
        for way in ("lower", "higher")
    ]
