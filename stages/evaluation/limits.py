"""The limits of ``gate`` in params.yaml, and the one verdict on a recipe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from stages.pipeline.params import Section

FEW_QUERIES = 100
"""Below this many queries a set cannot show that nothing was lost."""
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
            breaches.append(f"{kind}.nonfinite {nonfinite} is above 0, which {key} requires")
    maxima: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
        ("max_ndcg_at_5_drop", "drop of ndcg_at_5",
         lambda m: -m["retrieval"]["ndcg_at_5"]["difference"]),
        ("max_margin_drop", "drop of margin", lambda m: -m["retrieval"]["margin"]["difference"]),
        ("max_changed_first_pages", "share of queries whose first page changed",
         lambda m: round(1 - m["retrieval"]["top1_agreement"], 6)),
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

    ``worse`` breaks a limit. ``no measurable loss`` needs at least 100 queries, and intervals of
    nDCG@5 and recall@1 that include 0 or lie above it. Everything else is ``within limits``.

    Parameters
    ----------
    metrics, gate
        As for `find_breaches`.

    Raises
    ------
    KeyError, TypeError
        If the metrics lack a figure.
    """
    breaches = find_breaches(metrics, gate)
    if breaches:
        more = f" (and {len(breaches) - 1} more)" if len(breaches) > 1 else ""
        return Verdict(WORSE, breaches[0] + more, breaches)
    queries = metrics["data"]["queries"]
    ndcg = metrics["retrieval"]["ndcg_at_5"]
    visible = ndcg["smallest_visible_loss"]
    losses = [
        name
        for key, name in (("ndcg_at_5", "nDCG@5"), ("recall_at_1", "recall@1"))
        if metrics["retrieval"][key]["high"] < 0
    ]
    if losses:
        figures = (
            f"nDCG@5 {ndcg['difference']:+.4f}, 95 % [{ndcg['low']:+.4f}, {ndcg['high']:+.4f}]"
        )
        return Verdict(WITHIN, f"a measurable loss of {' and '.join(losses)} ({figures})")
    shown = f"{queries} queries could have shown a loss of nDCG@5 of {visible:.3f} or more"
    if queries < FEW_QUERIES:
        return Verdict(WITHIN, f"no loss seen, but {shown}: too few to say more")
    return Verdict(NO_LOSS, shown)
