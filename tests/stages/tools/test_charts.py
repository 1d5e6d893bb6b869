import xml.etree.ElementTree as ET
from typing import Any

import pytest

from stages.tools.charts import (
    layers_chart,
    loss_chart,
    ndcg_chart,
    outputs_chart,
    ranks_chart,
    scores_chart,
    spread,
    svg,
)

HOSTILE = '</svg><script>alert("1")</script>&amp;'
LAYERS = [
    {"layer": f"{block}.mlp.{kind}_proj", "error": 0.1 + block / 100}
    for block in range(3)
    for kind in ("up", "down")
]
SCORES = [
    {"query": f"q{number}", "original": float(number), "quantized": number + 0.5}
    for number in range(7)
]
BARS = [
    {"bar": f"{recipe}: {model}", "recipe": recipe, "model": model, "ndcg_at_5": value}
    for recipe in ("zeta", HOSTILE)
    for model, value in (("original", 0.875), ("quantized", 0.75), ("mixed index", 0.8126))
]
LOSSES = [
    {"bar": "x", "recipe": recipe, "kind": kind, "loss": value}
    for recipe in ("zeta", HOSTILE)
    for kind, value in (("pages", 0.000235), ("queries", 0.0125))
]
RANKS = [
    {"bar": "x", "recipe": recipe, "way": way, "queries": value}
    for recipe in ("zeta", HOSTILE)
    for way, value in (("lower", 17), ("higher", 3))
]
ERRORS = [{"tuned": 0.1 + layer / 100, "rounded": 0.2} for layer in range(3)]
CHARTS: dict[str, dict[str, Any]] = {
    "ndcg": ndcg_chart(BARS),
    "layers": layers_chart({"zeta": LAYERS, HOSTILE: LAYERS}),
    "scores": scores_chart({"zeta": SCORES, HOSTILE: SCORES}),
    "loss": loss_chart(LOSSES),
    "ranks": ranks_chart(RANKS),
    "outputs": outputs_chart({"zeta": ERRORS, HOSTILE: ERRORS}),
}


def parse(drawn: str) -> tuple[list[ET.Element], list[str]]:
    elements = list(ET.fromstring(drawn).iter())
    return elements, [element.text for element in elements if element.text]


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_svg_without_scripts_or_addresses_and_always_the_same(name: str) -> None:
    drawn = svg(CHARTS[name])
    assert drawn == svg(CHARTS[name])
    elements, _ = parse(drawn)
    assert elements[0].tag.endswith("}svg")
    assert {element.tag.rpartition("}")[2] for element in elements} <= {
        "svg", "g", "path", "line", "rect", "text", "defs", "clipPath",
    }  # fmt: skip
    assert not any(key.endswith("href") for element in elements for key in element.attrib)


@pytest.mark.parametrize("name", CHARTS)
def test_recipes_are_shown_as_text_in_their_order(name: str) -> None:
    _, texts = parse(svg(CHARTS[name]))
    assert texts.index("zeta") < texts.index(HOSTILE)


def test_bars_carry_their_values() -> None:
    _, texts = parse(svg(CHARTS["ndcg"]))
    assert [texts.count(value) for value in ("0.875", "0.750", "0.813")] == [2, 2, 2]


def test_losses_and_ranks_carry_their_values_too() -> None:
    _, texts = parse(svg(CHARTS["loss"]))
    assert [texts.count(value) for value in ("0.000235", "0.012500")] == [2, 2]
    _, texts = parse(svg(CHARTS["ranks"]))
    assert [texts.count(value) for value in ("17", "3")] == [2, 2]


def test_charts_of_different_recipes_can_share_a_scale() -> None:
    assert spread(iter([3, 1.5, 2])) == (1.5, 3)
    layers = layers_chart({"zeta": LAYERS}, (0.05, 0.5))["spec"]
    assert layers["encoding"]["y"]["scale"]["domain"] == [0.05, 0.5]
    for layer in scores_chart({"zeta": SCORES}, (-1, 9))["spec"]["layer"]:
        for axis in ("x", "y"):
            assert layer["encoding"][axis]["scale"]["domain"] == [-1, 9]


def marks(name: str, description: str) -> int:
    elements, _ = parse(svg(CHARTS[name]))
    return sum(element.get("aria-roledescription") == description for element in elements)


def test_every_query_and_every_layer_has_its_mark() -> None:
    assert marks("scores", "circle") == 2 * len(SCORES)
    assert marks("layers", "point") == 2 * len(LAYERS)
    assert marks("ndcg", "bar") == len(BARS)
    assert (marks("loss", "bar"), marks("ranks", "bar")) == (len(LOSSES), len(RANKS))
    assert marks("outputs", "point") == 2 * 2 * len(ERRORS)


def test_layers_are_told_apart_by_block_and_kind() -> None:
    values = CHARTS["layers"]["data"]["values"]
    assert values[3] == {"recipe": "zeta", "block": 1, "linear": "mlp.down_proj", "error": 0.11}
