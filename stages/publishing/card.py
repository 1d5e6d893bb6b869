"""The model card of a released folder: a template filled with the recipe and its metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from colqwen3.system.errors import UserError

TEMPLATE = Path(__file__).with_name("card.md.jinja")
SOURCE_CARD = "README.md"
TAGS = (
    "colqwen3", "visual-document-retrieval", "late-interaction", "multi-vector",
    "sentence-transformers", "auto-round",
)  # fmt: skip
METHODS = {
    "autoround": "AutoRound, {iters} iterations, seed {seed}",
    "rtn": "rounding to nearest, without data",
}
REQUIREMENTS = {
    "auto_round": "transformers torch auto-round pillow",
    "auto_gptq": "transformers torch optimum gptqmodel pillow",
    "llm_compressor": "transformers torch compressed-tensors pillow",
}
UNKNOWN = "unknown"


def read_source_card(source: Path) -> dict[str, Any]:
    """Return the metadata of a model folder's own card, empty without one.

    Raises
    ------
    UserError
        If its metadata block is damaged.
    """
    path = source / SOURCE_CARD
    if not path.is_file():
        return {}
    try:
        data: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # yaml raises types of its own
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: has a damaged metadata block ({reason}); mend or remove it"
        ) from None
    return data


def card_data(source_card: Mapping[str, Any], facts: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata block of the card.

    Parameters
    ----------
    source_card
        What `read_source_card` found; gives licence, language and more tags.
    facts
        As `write_card` takes them.
    """
    metrics = facts["metrics"]
    task = {
        "task_type": "visual-document-retrieval",
        "dataset_type": facts["dataset"],
        "dataset_name": facts["measured_on"],
    }
    results = [
        EvalResult(
            **task,
            metric_type=kind,
            metric_value=metrics["retrieval"][key]["quantized"],
            metric_name=name,
        )
        for key, kind, name in (
            ("ndcg_at_5", "ndcg_at_5", "nDCG@5"),
            ("recall_at_1", "recall_at_1", "recall@1"),
        )
    ]
    more = source_card.get("tags")
    more = more if isinstance(more, list) else []
    kept = {
        key: source_card[key]
        for key in ("language", "license_name", "license_link")
        if source_card.get(key)
    }
    return ModelCardData(
        license=source_card.get("license") or UNKNOWN,
        library_name="transformers",
        pipeline_tag="visual-document-retrieval",
        tags=list(dict.fromkeys([*TAGS, f"{facts['bits']}-bit", *more])),
        base_model=facts["base_model"],
        base_model_relation="quantized",
        model_name=facts["title"],
        eval_results=results,
        **kept,
    )


def write_card(folder: Path, source_card: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write README.md of a released folder.

    Parameters
    ----------
    folder
        Where to.
    source_card
        What `read_source_card` found.
    facts
        The variables of the template that need no metrics, and ``metrics``: those of `evaluate`.

    Raises
    ------
    UserError
        If the metrics lack a figure.
    """
    try:
        values = {**facts, **_figures(facts["metrics"])}
        data = card_data(source_card, facts)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"metrics/{facts['recipe']}.json: lacks a figure of the card ({error}); "
            f"run `dvc repro evaluate@{facts['recipe']}`"
        ) from None
    values["licence_text"] = _licence(data, facts["licence_files"])
    values["demonstration"] = "demonstration" in (data.tags or [])
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **values)
    (folder / "README.md").write_text(card.content.rstrip() + "\n", encoding="utf-8")


def describe_method(values: Mapping[str, Any]) -> str:
    """Return a recipe's method in words."""
    return METHODS[values["method"]].format_map(values)


def describe_fallback(recipe: Mapping[str, Any]) -> str | None:
    """Say which recipe made the checkpoint, and why, where it was a fallback."""
    if "instead_of" not in recipe:
        return None
    return (
        f"**Made by the fallback recipe `{recipe['ran']}`**, because `{recipe['instead_of']}` failed: "
        f"{recipe['because']}"
    )


def describe_calibration(calibration: Mapping[str, Any]) -> str:
    """Return the calibration samples in words."""
    if not calibration["samples"]:
        return "none"
    kinds = ("pages", "queries", "passages")
    counts = ", ".join(f"{calibration[kind]} {kind}" for kind in kinds if calibration[kind])
    return f"{counts} ({calibration['tokens']:,} tokens)"


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics as the table shows them."""
    retrieval = metrics["retrieval"]
    ndcg, recall = retrieval["ndcg_at_5"], retrieval["recall_at_1"]
    signed = {key: f"{ndcg[key]:+.4f}" for key in ("difference", "low", "high")}
    files = metrics["size"]["files"]
    return {
        "ndcg": {**{key: f"{ndcg[key]:.4f}" for key in ("original", "quantized")}, **signed},
        "recall": {key: f"{recall[key]:.4f}" for key in ("original", "quantized")},
        "mixed_ndcg": f"{metrics['mixed_index']['ndcg_at_5']['quantized']:.4f}",
        "first_stayed": f"{100 * retrieval['top1_agreement']:.1f} %",
        "cosine_pages": f"{metrics['pages']['cosine']['mean']:.5f}",
        "cosine_queries": f"{metrics['queries']['cosine']['mean']:.5f}",
        "bytes": f"{files['quantized']:,}",
        "bytes_original": f"{files['original']:,}",
    }


def _licence(data: ModelCardData, files: list[str]) -> str:
    if data.license == UNKNOWN:
        text = "The base model's folder does not say its licence: ask its publisher."
    else:
        text = f"The weights are under the base model's licence, `{data.license}`."
    return f"{text} Its text: {', '.join(files)}." if files else text
