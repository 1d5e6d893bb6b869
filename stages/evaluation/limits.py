"""The limits of ``gate`` in params.yaml, and the one verdict on a recipe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import Field

from stages.pipeline.params import Section

FEW_PAGES = 20
"""Below this many pages to choose from, a query can hardly miss."""
FEW_QUERIES = 100
"""Below this many queries a set cannot show that nothing was lost."""
MEASURED = {"ndcg_at_5": "nDCG@5", "recall_at_1": "recall@1", "margin": "margin"}
"""Figures whose interval tells whether a loss is measurable."""
NO_LOSS, WITHIN, WORSE = "no measurable loss", "within limits", "worse"


class GateParams(Section):
    """Limits that a recipe must keep to be released; null switches one off."""

    min_query_cosine: float | None = Field(ge=-1, le=1)
    min_page_cosine: float | None = Field(ge=-1, le=1)
    max_ndcg_at_5_drop: float | None = Field(ge=0, le=1)
    max_margin_drop: float | None = Field(default=None, ge=0)
    max_changed_first_pages: float | None = Field(default=None, ge=0, le=1)
    max_layers_worse_than_rounding: int | None = Field(default=None, ge=0)
    max_bytes: int | None = Field(gt=0)


@dataclass(frozen=True)
class Verdict:
    """What is said of a recipe in summary, report, card and at the end of a run.

    Attributes
    ----------
    verdict
        ``no measurable loss``, ``within limits`` or ``worse``.
    reason
        One line.
    breaches
        One line for every limit that is broken; empty unless the verdict is ``worse``.
    """

    verdict: str
    reason: str
    breaches: list[str] = field(default_factory=list)


def find_breaches(metrics: Mapping[str, Any], gate: GateParams) -> list[str]:
    """Return one line for every limit that a recipe's metrics break; a figure may equal its limit.

    A cosine limit is also broken by NaN or Inf in the embeddings: the cosine leaves such tokens
    out, so it cannot vouch for them.

    Parameters
    ----------
    metrics
        ``metrics/quality/<recipe>.json``.
    gate
        The limits.

    Raises
    ------
    KeyError, TypeError
        If the metrics lack a figure.
    """
    breaches = []
    cosines = {
        "queries": ("gate.min_query_cosine", gate.min_query_cosine),
        "pages": ("gate.min_page_cosine", gate.min_page_cosine),
    }
    # each test is written so that a NaN breaks it
    for kind, (key, minimum) in cosines.items():
        if minimum is None:
            continue
        cosine, nonfinite = metrics[kind]["cosine"]["mean"], metrics[kind]["nonfinite"]
        if not cosine >= minimum:
            breaches.append(f"{kind}.cosine.mean {cosine} is below {key} {minimum}")
        if not nonfinite <= 0:
            breaches.append(f"{kind}.nonfinite {nonfinite} is above 0, as {key} {minimum} requires")
    maxima: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
        ("max_ndcg_at_5_drop", "drop of ndcg_at_5",
         lambda m: -m["retrieval"]["ndcg_at_5"]["difference"]),
        ("max_margin_drop", "drop of margin", lambda m: -m["retrieval"]["margin"]["difference"]),
        ("max_changed_first_pages", "share of queries whose first page changed",
         lambda m: m["retrieval"]["first_pages"]["changed_share"]),
        ("max_layers_worse_than_rounding", "layers whose tuning was worse than rounding",
         lambda m: m["quantization"]["layers_worse_than_rounding"]),
        ("max_bytes", "size.files.quantized", lambda m: m["size"]["files"]["quantized"]),
    )  # fmt: skip
    for key, name, figure in maxima:
        maximum = getattr(gate, key)
        if maximum is not None and not (value := figure(metrics)) <= maximum:
            breaches.append(f"{name} {value} is above gate.{key} {maximum}")
    return breaches


def judge(metrics: Mapping[str, Any], gate: GateParams) -> Verdict:
    """Return the verdict on a recipe, from the limits and the 95 % intervals.

    ``worse`` breaks a limit. ``no measurable loss`` needs at least 100 queries and 20 pages,
    intervals of nDCG@5 (on its own pages and on the original's), recall@1 and margin that include 0
    or lie above it, finite embeddings, and nothing
    measured that the recipe was tuned on. Everything else is ``within limits``.

    Parameters
    ----------
    metrics, gate
        As for `find_breaches`.

    Raises
    ------
    KeyError, TypeError
        If the metrics lack a figure.
    """
    verdict = _judge(metrics, gate)
    if serving := metrics.get("serving"):
        said = f"{verdict.reason}; as served with {serving['activations']} activations"
        return replace(verdict, reason=said)
    return verdict


def _judge(metrics: Mapping[str, Any], gate: GateParams) -> Verdict:
    doubts = [text for text in (describe_sharing(metrics), _describe_nonfinite(metrics)) if text]
    breaches = find_breaches(metrics, gate)
    if breaches:
        more = f" (and {len(breaches) - 1} more)" if len(breaches) > 1 else ""
        return Verdict(WORSE, "; ".join([breaches[0] + more, *doubts]), breaches)
    queries, pages = metrics["data"]["queries"], metrics["data"]["pages"]
    measured = [(name, metrics["retrieval"][key]) for key, name in MEASURED.items()]
    measured.append(("nDCG@5 on the original's pages", metrics["mixed_index"]["ndcg_at_5"]))
    losses = [_describe_loss(name, figure) for name, figure in measured if not figure["high"] >= 0]
    if losses:
        return Verdict(WITHIN, "; ".join([f"a measurable loss: {', '.join(losses)}", *doubts]))
    first = metrics["retrieval"]["first_pages"]
    visible = metrics["retrieval"]["ndcg_at_5"]["smallest_visible_loss"]
    shown = (
        f"{first['changed']} of {queries} first pages changed, which allows up to "
        f"{100 * first['changed_share_at_most']:.1f} %; a loss of nDCG@5 below {visible:.3f} "
        "could not have been seen"
    )
    if queries < FEW_QUERIES or pages < FEW_PAGES:
        few = f"no loss seen, but {queries} queries on {pages} pages are too few to show that there is none"
        return Verdict(WITHIN, "; ".join([few, shown, *doubts]))
    if doubts:
        return Verdict(WITHIN, "; ".join(["no loss seen", shown, *doubts]))
    return Verdict(NO_LOSS, shown)


def _describe_loss(name: str, figure: Mapping[str, float]) -> str:
    return (
        f"{name} {figure['difference']:+.4f} (95 % {figure['low']:+.4f} to {figure['high']:+.4f})"
    )


def describe_sharing(metrics: Mapping[str, Any]) -> str:
    """Say what of the evaluation set the recipe may have been tuned on; empty if nothing."""
    shared = metrics["overlap"]
    if shared["same_folder"]:
        return "measured on the dataset that it was tuned on"
    if shared["pages"] or shared["queries"]:
        return (
            f"{shared['pages']} pages and {shared['queries']} queries are also in the dataset that "
            "it was tuned on"
        )
    return ""


def _describe_nonfinite(metrics: Mapping[str, Any]) -> str:
    texts = []
    for key, whose in (("nonfinite", "its"), ("nonfinite_original", "the original's")):
        count = metrics["queries"][key] + metrics["pages"][key]
        if count:
            texts.append(f"{count} values of {whose} embeddings are NaN or Inf")
    return "; ".join(texts)
