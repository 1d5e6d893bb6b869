"""Loss against bytes, of the sizes that ``python -m demo.studies.scale --frontier`` has measured.

``python -m demo.studies.scale.frontier`` draws them; their tables are in docs/smaller.md.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_file
from demo.studies.scale.contenders import FRONTIER, Contender
from demo.studies.scale.losses import KINDS
from demo.training.shapes import SIZES
from stages.tools.charts import svg

METRICS = Path("metrics/scale")
PLOT = Path("docs/images/frontier.svg")
PANEL = 260
FIX = "run `python -m demo.studies.scale --frontier`"


def read_frontiers(folder: Path = METRICS) -> dict[str, dict[str, Any]]:
    """Return the results of the sizes that were measured, by shape, smallest model first.

    Raises
    ------
    UserError
        If there are none, or a file is damaged.
    """
    paths = {shape: folder / f"frontier-{shape}.json" for shape in SIZES}
    found = {shape: read_json(path, FIX) for shape, path in paths.items() if path.exists()}
    if not found:
        raise UserError(f"{folder}: holds no frontier-<shape>.json; {FIX}")
    return dict(sorted(found.items(), key=lambda item: int(item[1]["parameters"]["total"])))


def way(contender: Contender) -> str:
    """Return how the widths of a contender come about."""
    if "bytes" in (contender.weights or {}):
        return "budget of bytes"
    if contender.has_budget:
        return "budget of bits"
    if contender.end_to_end:
        return "the same, end to end"
    return "embeddings and vision too" if contender.quantizes_vision else "uniform"


def points(results: Mapping[str, Any], page_set: str) -> list[dict[str, Any]]:
    """Return loss against bytes of the contenders of one size, smallest first.

    Parameters
    ----------
    results
        Of one size.
    page_set
        Name of the page set that the losses are of.

    Returns
    -------
    list
        For each contender ``recipe``, ``way``, ``mb`` (bytes / 10^6), ``share`` (of the bytes of the
        original), ``pages`` and ``queries`` (1 - mean cosine of tokens).
    """
    made = [
        {
            "recipe": recipe["contender"],
            "way": way(FRONTIER[recipe["contender"]]),
            "mb": recipe["bytes"] / 1e6,
            "share": recipe["bytes"] / results["original_bytes"],
            **recipe["loss"][page_set],
        }
        for recipe in results["recipes"].values()
        if recipe["contender"] in FRONTIER
    ]
    return sorted(made, key=lambda point: (point["mb"], point["recipe"]))


def chart(frontiers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Describe loss against bytes: a column a size, a row for pages and one for queries."""
    values = [
        {**point, "size": shape, "kind": kind, "loss": point[kind]}
        for shape, results in frontiers.items()
        for point in points(results, next(iter(results["page_sets"])))
        for kind in KINDS
    ]
    position = {
        "x": {
            "field": "share",
            "type": "quantitative",
            "title": "bytes, of those of the 16-bit model",
            "scale": {"zero": False, "nice": False, "padding": 14},
            "axis": {"format": ".0%", "tickCount": 5},
        },
        "y": {
            "field": "loss",
            "type": "quantitative",
            "title": "loss (1 - mean cosine)",
            "scale": {"type": "log", "nice": False, "padding": 10},
            "axis": {"tickCount": 4, "format": ".0e"},
        },
    }
    colour = {"field": "way", "type": "nominal", "title": None, "legend": {"orient": "top"}}
    label = {"field": "recipe", "type": "nominal"}
    return {
        "title": "Study models trained for this, not the 4B model",
        "data": {"values": values},
        "facet": {
            "column": {"field": "size", "type": "nominal", "sort": list(frontiers), "title": None},
            "row": {"field": "kind", "type": "nominal", "sort": list(KINDS), "title": None},
        },
        "spec": {
            "width": PANEL,
            "height": PANEL,
            "layer": [
                {
                    "mark": {"type": "line", "point": True},
                    "encoding": {**position, "color": colour},
                },
                {
                    "mark": {"type": "text", "align": "left", "dx": 6, "dy": -5, "fontSize": 9},
                    "encoding": {**position, "text": label},
                },
            ],
        },
        "resolve": {"scale": {"x": "independent", "y": "independent"}},
    }


def main() -> None:
    """Draw the sizes that were measured."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.studies.scale.frontier", description=__doc__
    )
    parser.add_argument("--plot", type=Path, default=PLOT, metavar="FILE.svg")
    options = parser.parse_args()
    write_file(options.plot, svg(chart(read_frontiers())).encode())


if __name__ == "__main__":
    run(main)
