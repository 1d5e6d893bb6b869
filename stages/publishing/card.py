"""The model card of a released folder: a template filled with the recipe and its metrics."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from colqwen3.system.errors import UserError
from stages.pipeline.paths import QUALITY_METRICS

TEMPLATE = Path(__file__).with_name("card.md.jinja")
SOURCE_CARD = "README.md"
TAGS = (
    "colqwen3", "visual-document-retrieval", "late-interaction", "multi-vector",
    "sentence-transformers", "auto-round",
)  # fmt: skip
GGUF_TAGS = (*(tag for tag in TAGS if tag != "sentence-transformers"), "gguf")
METHODS = {
    "autoround": "AutoRound, {iters} iterations, seed {seed}",
    "gptq": "GPTQ",
    "rtn": "rounding to nearest, without data",
}
REQUIREMENTS = {
    "auto_round": "transformers torch auto-round pillow",
    "auto_gptq": "transformers torch optimum gptqmodel pillow",
    "llm_compressor": "transformers torch compressed-tensors pillow",
    "gguf": "numpy pillow xllamacpp==2026.10.11549",
}
UNKNOWN = "unknown"
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,95}")
"""Licences, languages and tags as the Hub knows them; anything else in a card is not taken over."""
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~&$-])")


def plain(text: str) -> str:
    """Return a text on one line in which Markdown and HTML read as they are written.

    A backslash escapes every punctuation character (CommonMark 0.31, section 2.4).
    """
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))


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
            f"{path}: has a damaged metadata block ({reason}); fix or remove it"
        ) from None
    return data


PARTS = {
    "language_model": "the linears of its language model",
    "vision_attention": "the attention of its vision tower",
    "vision_mlp": "the MLPs of its vision tower",
    "vision_mergers": "its mergers",
    "token_embeddings": "its token embeddings",
}
"""Parts of a model as metrics/quantize/<recipe>.json names them."""


def describe_weights(bits: Mapping[str, Any]) -> tuple[str, str]:
    """Return in words what a checkpoint holds in how many bits, and what stays as it was.

    Parameters
    ----------
    bits
        Of metrics/quantize/<recipe>.json: part -> bits -> number of linears; a plain number for the
        token embeddings.
    """
    quantized: dict[str, list[str]] = {}
    unquantized = []
    for part, words in PARTS.items():
        value = bits.get(part, 16)
        counts = {str(value): 1} if isinstance(value, int) else value
        if counts.keys() == {"16"}:
            unquantized.append(words)
            continue
        total = sum(counts.values())
        shares = [
            f"{width} bits" if len(counts) == 1 else f"{width} ({count} of {total})"
            for width, count in sorted(counts.items())
        ]
        said = ", ".join(shares) + (" bits" if len(counts) > 1 else "")
        quantized.setdefault(said, []).append(words)
    parts = [f"{_join(_whole_tower(words))} in {said}" for said, words in quantized.items()]
    kept = _join(
        [
            *(word.removeprefix("its ").removeprefix("the ") for word in _whole_tower(unquantized)),
            "projection",
        ]
    )
    return "; ".join(parts), f"{kept[0].upper()}{kept[1:]} {'are' if unquantized else 'is'}"


def suits_vllm(bits: Mapping[str, Any]) -> bool:
    """Whether vLLM was seen to run it: the language model alone is quantized, all of it to 4 bits."""
    others = {key for key in bits if key not in ("language_model", "token_embeddings")}
    return not others and bits["token_embeddings"] == 16 and bits["language_model"].keys() == {"4"}


def _whole_tower(words: list[str]) -> list[str]:
    """Return parts in words, the vision tower as one where all of its parts are there."""
    tower = [PARTS[part] for part in PARTS if part.startswith("vision_")]
    if not set(tower) <= set(words):
        return words
    place = words.index(tower[0])
    others = [word for word in words if word not in tower]
    return [*others[:place], "its vision tower", *others[place:]]


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def card_data(source_card: Mapping[str, Any], facts: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata block of the card.

    Of the source's card only what is an identifier or a plain link is taken over.

    Parameters
    ----------
    source_card
        As `read_source_card` returns it; gives licence, language and more tags.
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
    is_gguf = facts.get("format") == "gguf"
    own_tags = GGUF_TAGS if is_gguf else TAGS
    languages, tags = (_identifiers(source_card.get(key)) for key in ("language", "tags"))
    taken_over: dict[str, Any] = (
        {"language": languages if isinstance(source_card.get("language"), list) else languages[0]}
        if languages
        else {}
    )
    for name in _identifiers(source_card.get("license_name")):
        taken_over["license_name"] = name
    if link := _link(source_card.get("license_link")):
        taken_over["license_link"] = link
    return ModelCardData(
        license=licence_of(source_card) or UNKNOWN,
        library_name="llama.cpp" if is_gguf else "transformers",
        pipeline_tag="visual-document-retrieval",
        tags=list(dict.fromkeys([*own_tags, f"{facts['bits']}-bit", *tags])),
        base_model=facts["base_model"],
        base_model_relation="quantized",
        model_name=facts["title"],
        eval_results=results,
        **taken_over,
    )


def licence_of(source_card: Mapping[str, Any]) -> str | None:
    """Return the identifier of the source's licence; None if its card has none."""
    return next(iter(_identifiers(source_card.get("license"))), None)


def _identifiers(value: object) -> list[str]:
    """Return the identifiers of a field that holds one or a list; what is none is left out."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str) and IDENTIFIER.fullmatch(item)]


def _link(value: object) -> str | None:
    """Return a link to the web or to a file of the folder, None of anything else."""
    allowed = r"(https://)?[A-Za-z0-9][A-Za-z0-9._/~%-]{0,300}"
    return value if isinstance(value, str) and re.fullmatch(allowed, value) else None


def write_card(folder: Path, source_card: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write README.md of a released folder.

    Parameters
    ----------
    folder
        Where to.
    source_card
        As `read_source_card` returns it.
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
            f"{QUALITY_METRICS / facts['recipe']}.json: lacks a figure of the card ({error}); "
            f"run `dvc repro evaluate@{facts['recipe']}`"
        ) from None
    values["licence_text"] = _licence(data, facts["licence_files"])
    values["demonstration"] = "demonstration" in (data.tags or [])
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), **values)
    (folder / "README.md").write_text(card.content.rstrip() + "\n", encoding="utf-8")


def describe_method(values: Mapping[str, Any], outcome: Mapping[str, Any] | None = None) -> str:
    """Return a recipe's method in words.

    Parameters
    ----------
    values
        Of the recipe.
    outcome
        Of its end-to-end tuning, as in metrics/quantize/<recipe>.json; None where it is not known.
    """
    method = METHODS[values["method"]].format_map(values)
    if values.get("hessian") == "model":
        method += " by the whole model"
    if not values.get("end_to_end"):
        return method
    steps = values["end_to_end"]["steps"]
    if outcome and not outcome["kept"]:
        return f"{method}; {steps} steps end to end did not help and are not in it"
    return f"{method}, then {steps} steps end to end"


def describe_fallback(recipe: Mapping[str, Any]) -> str | None:
    """Say which recipe the checkpoint is from, and why, where it was a fallback."""
    if "instead_of" not in recipe:
        return None
    return (
        f"**Quantized by the fallback recipe `{recipe['ran']}`**, because `{recipe['instead_of']}` failed: "
        f"{plain(recipe['because'])}"
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
        "first_changed": f"{retrieval['first_pages']['changed']} of {metrics['data']['queries']}",
        "cosine_pages": f"{metrics['pages']['cosine']['mean']:.5f}",
        "cosine_queries": f"{metrics['queries']['cosine']['mean']:.5f}",
        "serving": metrics.get("serving", {}).get("activations"),
        "bytes": f"{files['quantized']:,}",
        "bytes_original": f"{files['original']:,}",
    }


def _licence(data: ModelCardData, files: list[str]) -> str:
    if data.license == UNKNOWN:
        text = "The base model's folder does not say its licence: ask its publisher."
    else:
        text = f"The weights are under the base model's licence, `{data.license}`."
    return f"{text} Its text: {', '.join(map(plain, files))}." if files else text
