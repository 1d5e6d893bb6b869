"""Charts of the report as SVG, drawn from Vega-Lite descriptions by vl-convert, without network.

Each is narrow enough for a phone; a report sets several side by side. Figures in labels are
formatted here, so that they read as in the tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import vl_convert

Points = Sequence[Mapping[str, Any]]
Range = tuple[float, float]
COLOURS = {"original": "#8d99ae", "quantized": "#d1495b", "mixed index": "#edae49"}
KINDS = {"pages": "#33658a", "queries": "#86bbd8"}
WAYS = {"lower": "#d1495b", "higher": "#7a9e7e"}
ERRORS = {"tuned": "#33658a", "rounded": "#8d99ae"}
BITS = {"2": "#d1495b", "3": "#edae49", "4": "#33658a", "8": "#7a9e7e"}
PANEL = 300
VEGA_LITE = "5.21"


def svg(spec: Mapping[str, Any]) -> str:
    """Draw a Vega-Lite description; equal descriptions give equal text."""
    config = {
        "view": {"stroke": "#cccccc"},
        "axis": {"gridColor": "#eeeeee"},
        # a browser's font may be wider than the one that text was measured by
        "padding": {"left": 25, "right": 45, "top": 5, "bottom": 5},
    }
    return vl_convert.vegalite_to_svg(
        {**spec, "config": config}, vl_version=VEGA_LITE, allowed_base_urls=[]
    )


def spread(values: Iterable[float]) -> Range:
    """Return smallest and largest of some values, which several charts then share as their scale."""
    listed = [float(value) for value in values]
    return min(listed), max(listed)


def ndcg_chart(bars: Points) -> dict[str, Any]:
    """Describe bars of nDCG@5, grouped by recipe; `bars` as `ndcg_bars` gives."""
    return _bars(bars, "ndcg_at_5", "nDCG@5", "model", COLOURS, ".3f", {"domain": [0, 1]})


def loss_chart(bars: Points) -> dict[str, Any]:
    """Describe bars of what tokens lost, grouped by recipe; `bars` as `loss_bars` gives."""
    return _bars(bars, "loss", "1 - mean cosine", "kind", KINDS, ".6f")


def ranks_chart(bars: Points) -> dict[str, Any]:
    """Describe bars of how many queries changed, grouped by recipe; `bars` as `rank_bars` gives."""
    return _bars(bars, "queries", "queries", "way", WAYS, "d")


def _bars(
    bars: Points,
    figure: str,
    title: str,
    group: str,
    colours: Mapping[str, str],
    form: str,
    scale: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe horizontal bars with their figures, one group per recipe."""
    values = [{**bar, "label": format(bar[figure], form)} for bar in bars]
    x = {"field": figure, "type": "quantitative", "title": title, "axis": {"tickCount": 3}}
    if scale:
        x["scale"] = scale
    colour = {
        "field": group,
        "type": "nominal",
        "legend": {"orient": "top"},
        "title": None,
        "scale": {"domain": list(colours), "range": list(colours.values())},
    }
    return {
        "data": {"values": values},
        "width": PANEL,
        "height": {"step": 20},
        "encoding": {
            "y": {"field": "recipe", "type": "nominal", "sort": None, "title": None},
            "yOffset": {"field": group, "sort": list(colours)},
        },
        "layer": [
            {"mark": "bar", "encoding": {"x": x, "color": colour}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4},
                "encoding": {"x": x, "text": {"field": "label"}},
            },
        ],
    }


def layers_chart(layers: Mapping[str, Points], scale: Range | None = None) -> dict[str, Any]:
    """Describe the weight error of each quantized linear, by block and kind, one panel per recipe.

    Parameters
    ----------
    layers
        The points of ``metrics/plots/<recipe>/layers.json`` by recipe.
    scale
        Smallest and largest error, where several charts share them.
    """
    values = []
    for recipe, points in layers.items():
        for point in points:
            block, _, kind = str(point["layer"]).partition(".")
            values.append(
                {"recipe": recipe, "block": int(block), "linear": kind, "error": point["error"]}
            )
    colour = {
        "field": "linear", "type": "nominal", "legend": {"orient": "top", "columns": 2},
        "title": None,
    }  # fmt: skip
    return _lines(values, "relative error of the weight", colour, scale)


def outputs_chart(errors: Mapping[str, Points]) -> dict[str, Any]:
    """Describe the output error of each layer, tuned and rounded, one panel per recipe.

    `errors` has ``tuned`` and ``rounded`` of each layer, in order, by recipe.
    """
    values = [
        {"recipe": recipe, "block": block, "way": way, "error": point[way]}
        for recipe, points in errors.items()
        for block, point in enumerate(points)
        for way in ERRORS
    ]
    colour = {
        "field": "way", "type": "nominal", "legend": {"orient": "top"}, "title": None,
        "scale": {"domain": list(ERRORS), "range": list(ERRORS.values())},
    }  # fmt: skip
    return _lines(values, "relative error of the output", colour, None)


def _lines(
    values: Points, title: str, colour: Mapping[str, Any], scale: Range | None
) -> dict[str, Any]:
    """Describe errors by block as lines, one panel per recipe."""
    bounds: dict[str, Any] = {"zero": False} | ({"domain": list(scale)} if scale else {})
    x = {"field": "block", "type": "quantitative", "axis": {"tickMinStep": 1, "format": "d"}}
    y = {"field": "error", "type": "quantitative", "scale": bounds, "title": title}
    return {
        **_panels(values),
        "spec": {
            "width": PANEL,
            "height": 220,
            "mark": {"type": "line", "point": True},
            "encoding": {"x": x, "y": y, "color": colour},
        },
    }


def scores_chart(scores: Mapping[str, Points], scale: Range | None = None) -> dict[str, Any]:
    """Describe each query's score by original and quantized model, one panel per recipe.

    On the grey line the two are equal.

    Parameters
    ----------
    scores
        The points of ``metrics/plots/<recipe>/scores.json`` by recipe.
    scale
        Smallest and largest score, where several charts share them.
    """
    values = [{"recipe": recipe, **point} for recipe, points in scores.items() for point in points]
    sides = ("original", "quantized")
    low, high = scale or spread(value[side] for value in values for side in sides)
    axes = {
        axis: {
            "field": model,
            "type": "quantitative",
            "scale": {"zero": False, "domain": [low, high]},
            "title": f"{model} score",
        }
        for axis, model in zip("xy", sides, strict=True)
    }
    line = {"data": {"values": [dict.fromkeys(sides, end) for end in (low, high)]}}
    return {
        **_panels(values),
        "spec": {
            "width": PANEL,
            "height": PANEL,
            "layer": [
                {**line, "mark": {"type": "line", "color": "#999999"}, "encoding": axes},
                {"mark": {"type": "circle", "color": COLOURS["quantized"]}, "encoding": axes},
            ],
        },
    }


def _panels(values: Points) -> dict[str, Any]:
    """Describe one panel per recipe, below one another."""
    recipes = list(dict.fromkeys(value["recipe"] for value in values))
    facet = {"field": "recipe", "type": "nominal", "sort": recipes, "title": None}
    header = {"labelFontSize": 12, "labelFontWeight": "bold"}
    return {
        "data": {"values": values},
        "facet": {**facet, "header": header},
        "columns": 1,
    }


def sensitivity_chart(rows: Points, kind: str) -> dict[str, Any]:
    """Describe the loss of each part quantized alone, a point for each width, on a log scale.

    Parameters
    ----------
    rows
        As ``metrics/plots/sensitivity.json`` holds them.
    kind
        ``pages`` or ``queries``.
    """
    parts = list(dict.fromkeys(str(row["part"]) for row in rows))
    values = [
        {"part": row["part"], "bits": str(row["bits"]), "loss": max(float(row[kind]), 1e-9)}
        for row in rows
    ]
    return {
        "data": {"values": values},
        "title": kind,
        "mark": {"type": "point", "filled": True, "size": 45},
        "width": PANEL,
        "height": {"step": 14},
        "encoding": {
            "x": {
                "field": "loss",
                "type": "quantitative",
                "title": "1 - mean cosine",
                "scale": {"type": "log"},
                "axis": {"tickCount": 4, "format": ".0e"},
            },
            "y": {"field": "part", "type": "nominal", "sort": parts, "title": None},
            "color": {
                "field": "bits",
                "type": "nominal",
                "title": "bits",
                "scale": {"domain": list(BITS), "range": list(BITS.values())},
            },
        },
    }
