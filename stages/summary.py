"""A recipe's headline figures, one row of ``dvc metrics show``; stage `summary` plots nDCG of all.

`evaluate@<recipe>` writes the figures of `summarize` beside its full metrics. `python -m
stages.summary` collects those of all recipes for one plot. Nothing here is a timing.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from stages.errors import PipelineError, run
from stages.files import read_json, write_json
from stages.lock import claim
from stages.params import load_params
from stages.paths import METRICS, PLOTS

SUMMARIES = METRICS / "summary"
NDCG_PLOT = PLOTS / "ndcg.json"
DECIMALS = 5  # a row must fit a screen; metrics/<recipe>.json has more


def summarize(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reader compares first, from the metrics of a recipe, flat and short.

    ``cos_query`` and ``cos_page`` are the mean cosines of tokens, ``grade`` is that of the
    flattened cosine; ``ndcg5`` is nDCG@5 of the quantized model, ``ndcg5_orig`` of the original and
    ``ndcg5_mixed`` of quantized queries on the original's pages; ``recall1`` is the quantized
    model's; ``top1_same`` is the share of queries whose first page stayed; ``mb`` is the size of
    the checkpoint's weight files in 10^6 bytes.

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
        "grade": metrics["queries"]["grade"],
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


def main() -> None:
    """Write metrics/plots/ndcg.json from the summaries of the recipes in params.yaml."""
    argparse.ArgumentParser(prog="python -m stages.summary", description=__doc__).parse_args()
    params = load_params()
    claim("summary")
    summaries = {}
    for recipe in params.recipes:
        path, mend = SUMMARIES / f"{recipe}.json", f"run `dvc repro evaluate@{recipe}`"
        summaries[recipe] = read_json(path, mend)
        try:
            ndcg_bars({recipe: summaries[recipe]})
        except (KeyError, TypeError) as error:
            raise PipelineError(f"{path}: lacks a figure ({error}); {mend}") from None
    write_json(NDCG_PLOT, ndcg_bars(summaries))


if __name__ == "__main__":
    run(main)
