"""Charts of the report as SVG, drawn from Vega-Lite descriptions by vl-convert, without network."""

from collections.abc import Mapping, Sequence
from typing import Any

import vl_convert

Points = Sequence[Mapping[str, Any]]
COLOURS = {"original": "#8d99ae", "quantized": "#d1495b", "mixed index": "#edae49"}
PANEL, GAP = 330, 30
VEGA_LITE = "5.21"


def svg(spec: Mapping[str, Any]) -> str:
    """Draw a Vega-Lite description; equal descriptions give equal text."""
    config = {"view": {"stroke": "#cccccc"}, "axis": {"gridColor": "#eeeeee"}}
    return vl_convert.vegalite_to_svg(
        {**spec, "config": config}, vl_version=VEGA_LITE, allowed_base_urls=[]
    )


def ndcg_chart(bars: Points) -> dict[str, Any]:
    """Describe bars of nDCG@5, grouped by recipe; `bars` as `stages.summary.ndcg_bars` gives."""
    y = {"field": "recipe", "type": "nominal", "sort": None, "title": None}
    x = {
        "field": "ndcg_at_5",
        "type": "quantitative",
        "title": "nDCG@5",
        "scale": {"domain": [0, 1]},
    }
    colour = {
        "field": "model",
        "type": "nominal",
        "legend": {"orient": "top"},
        "scale": {"domain": list(COLOURS), "range": list(COLOURS.values())},
    }
    offset = {"field": "model", "sort": list(COLOURS)}
    return {
        "data": {"values": bars},
        "width": 2 * PANEL,
        "height": {"step": 20},
        "encoding": {"y": y, "yOffset": offset},
        "layer": [
            {"mark": "bar", "encoding": {"x": x, "color": colour}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4},
                "encoding": {"x": x, "text": {"field": "ndcg_at_5", "format": ".3f"}},
            },
        ],
    }


def layers_chart(layers: Mapping[str, Points]) -> dict[str, Any]:
    """Describe the weight error of each quantized linear, by block and kind, a panel a recipe.

    `layers` has the points of metrics/plots/<recipe>/layers.json by recipe.
    """
    values = []
    for recipe, points in layers.items():
        for point in points:
            block, _, kind = str(point["layer"]).partition(".")
            values.append(
                {"recipe": recipe, "block": int(block), "linear": kind, "error": point["error"]}
            )
    return {
        **_panels(values),
        "spec": {
            "width": PANEL,
            "height": 220,
            "mark": {"type": "line", "point": True},
            "encoding": {
                "x": {
                    "field": "block",
                    "type": "quantitative",
                    "axis": {"tickMinStep": 1, "format": "d"},
                },
                "y": {
                    "field": "error",
                    "type": "quantitative",
                    "scale": {"zero": False},
                    "title": "relative error",
                },
                "color": {"field": "linear", "type": "nominal", "legend": {"orient": "top"}},
            },
        },
    }


def scores_chart(scores: Mapping[str, Points]) -> dict[str, Any]:
    """Describe each query's score by original and quantized model, a panel a recipe.

    `scores` has the points of metrics/plots/<recipe>/scores.json by recipe. On the grey line the
    two are equal.
    """
    values = [{"recipe": recipe, **point} for recipe, points in scores.items() for point in points]
    ends = [value[model] for value in values for model in ("original", "quantized")]
    low, high = min(ends), max(ends)
    scale = {"zero": False, "domain": [low, high]}
    axes = {
        axis: {"field": model, "type": "quantitative", "scale": scale, "title": f"{model} score"}
        for axis, model in (("x", "original"), ("y", "quantized"))
    }
    line = {
        "data": {"values": [dict.fromkeys(("original", "quantized"), end) for end in (low, high)]}
    }
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
    """Describe one panel a recipe, two in a row."""
    recipes = list(dict.fromkeys(value["recipe"] for value in values))
    facet = {"field": "recipe", "type": "nominal", "sort": recipes, "title": None}
    header = {"labelFontSize": 12, "labelFontWeight": "bold"}
    return {
        "data": {"values": values},
        "facet": {**facet, "header": header},
        "columns": 2,
        "spacing": GAP,
    }
