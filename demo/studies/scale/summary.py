"""Make a table and a plot of the study's figures.

``python -m demo.studies.scale.summary FILE.json ... [--table FILE.md] [--plot FILE.svg]`` reads the
files that ``python -m demo.studies.scale`` wrote, and nothing else.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_file
from demo.studies.scale.contenders import CONTENDERS, ROUNDING, TEXT
from demo.studies.scale.losses import KINDS
from stages.tools.charts import svg

PANEL = 240
UNIT = 1e-6
"""Of the losses in the tables, which span three orders of magnitude."""
Results = Mapping[str, Any]


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read results, smallest model first.

    Raises
    ------
    UserError
        If a file is none of the study's.
    """
    found = []
    for path in paths:
        results = read_json(path, "give files of `python -m demo.studies.scale`")
        if not isinstance(results, dict) or not {"parameters", "page_sets", "recipes"} <= set(
            results
        ):
            raise UserError(f"{path}: is no result of `python -m demo.studies.scale`")
        found.append(results)
    return sorted(found, key=lambda results: int(results["parameters"]["total"]))


def points(results: Results) -> list[dict[str, Any]]:
    """Return one point for each contender, bits, page set and kind of token of a size.

    Figures are means over seeds; ``spread`` is their standard deviation (n - 1), None of one.
    """
    made = []
    recipes = list(results["recipes"].values())
    for bits in sorted({recipe["bits"] for recipe in recipes}, reverse=True):
        for contender in CONTENDERS:
            seeds = [r for r in recipes if (r["contender"], r["bits"]) == (contender, bits)]
            for page_set in results["page_sets"] if seeds else ():
                for kind in KINDS:
                    made.append(
                        {
                            "shape": results["shape"],
                            "parameters": results["parameters"]["total"],
                            "contender": contender,
                            "bits": bits,
                            "page_set": page_set,
                            "kind": kind,
                            "seeds": len(seeds),
                            **_figures(seeds, page_set, kind),
                        }
                    )
    return made


def _figures(seeds: Sequence[Results], page_set: str, kind: str) -> dict[str, float | None]:
    losses = [seed["loss"][page_set][kind] for seed in seeds]
    figures: dict[str, float | None] = {
        "loss": fmean(losses),
        "spread": stdev(losses) if len(losses) > 1 else None,
    }
    for key in ("to_rounding", "to_text"):
        ratios = [seed["ratio"].get(key, {}).get(page_set, {}).get(kind) for seed in seeds]
        known = [ratio for ratio in ratios if ratio is not None]
        figures[key] = fmean(known) if len(known) == len(ratios) else None
    return figures


def models_table(sizes: Iterable[Results]) -> str:
    """Return a Markdown table of the study models: what they are and how well they search."""
    sizes = list(sizes)
    names = list(dict.fromkeys(name for size in sizes for name in size["page_sets"]))
    rows = [
        [
            "study model",
            "parameters",
            "text layers x width",
            "vision blocks x width",
            "training",
            *(f"nDCG@5, {name}" for name in names),
        ]
    ]
    for size in sizes:
        depth, training = size["depth"], size["training"]
        rows.append(
            [
                f"`{size['shape']}`",
                f"{size['parameters']['total']:,}",
                f"{depth['text_layers']} x {depth['text_hidden']}",
                f"{depth['vision_blocks']} x {depth['vision_hidden']}",
                f"{training['wall_seconds']} s, {training['steps']:,} steps" if training else "",
                *(
                    f"{size['page_sets'][name]['ndcg_at_5']:.3f}"
                    if name in size["page_sets"]
                    else ""
                    for name in names
                ),
            ]
        )
    return _markdown(rows)


def losses_table(every: Sequence[Mapping[str, Any]], bits: int, page_set: str) -> str:
    """Return a Markdown table of losses at some bits on a page set, a row a model and contender.

    Pages are compared with plain rounding, queries with tuning on text alone as well.
    """
    rows = [
        [
            "study model",
            "tuned on",
            "loss of pages, 1e-6",
            "of rounding's",
            "loss of queries, 1e-6",
            "of rounding's",
            "of text-only tuning's",
        ]
    ]
    chosen = [p for p in every if (p["bits"], p["page_set"]) == (bits, page_set)]
    for shape in dict.fromkeys(point["shape"] for point in chosen):
        for contender in CONTENDERS:
            both = {
                point["kind"]: point
                for point in chosen
                if (point["shape"], point["contender"]) == (shape, contender)
            }
            if len(both) < len(KINDS):
                continue
            pages, queries = both["pages"], both["queries"]
            seeds = f" ({pages['seeds']} seeds)" if pages["seeds"] > 1 else ""
            rows.append(
                [
                    f"`{shape}`",
                    contender + seeds,
                    _loss(pages),
                    _ratio(pages["to_rounding"], contender == ROUNDING),
                    _loss(queries),
                    _ratio(queries["to_rounding"], contender == ROUNDING),
                    _ratio(queries["to_text"], contender == TEXT),
                ]
            )
    return _markdown(rows)


def _loss(point: Mapping[str, Any]) -> str:
    spread = "" if point["spread"] is None else f" ± {significant(point['spread'] / UNIT, 2)}"
    return significant(point["loss"] / UNIT) + spread


def significant(value: float, digits: int = 3) -> str:
    """Return a number with as many significant digits, without an exponent."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def _ratio(value: float | None, itself: bool) -> str:
    return "" if value is None or itself else f"{value:.2f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(sizes: Sequence[Results]) -> str:
    """Return all tables as Markdown, with what they are of."""
    every = [point for size in sizes for point in points(size)]
    parts = [
        "Study models that were trained for this, not the 4B model. Loss: 1 - mean cosine of tokens "
        "to the original's, in units of 1e-6; after ± the standard deviation over seeds.",
        models_table(sizes),
    ]
    for bits in dict.fromkeys(point["bits"] for point in every):
        for name in dict.fromkeys(point["page_set"] for point in every):
            parts += [f"{bits} bits, page set `{name}`", losses_table(every, bits, name)]
    return "\n\n".join(parts) + "\n"


def chart(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Describe loss ratios to plain rounding against parameters, a panel for each figure.

    Columns are bits and kinds of token, rows are page sets; both axes are logarithmic.
    """
    values = [
        {**point, "figure": f"{point['bits']} bits, {point['kind']}"}
        for point in every
        if point["to_rounding"]
    ]
    parameters = [value["parameters"] for value in values]

    def facet(field: str) -> dict[str, Any]:
        names = list(dict.fromkeys(value[field] for value in values))
        return {"field": field, "type": "nominal", "sort": names, "title": None}

    x = {
        "field": "parameters",
        "type": "quantitative",
        "title": "parameters of the study model",
        "scale": {"type": "log", "domain": [min(parameters) / 1.3, max(parameters) * 1.3]},
        "axis": {"format": ".2s", "values": sorted(set(parameters))},
    }
    y = {
        "field": "to_rounding",
        "type": "quantitative",
        "title": "loss / loss of plain rounding",
        "scale": {"type": "log", "nice": False, "padding": 10},
        "axis": {"format": "~g", "tickCount": 6},
    }
    colour = {**facet("contender"), "legend": {"orient": "top", "title": None}}
    return {
        "title": "Study models trained for this, not the 4B model",
        "data": {"values": values},
        "facet": {"column": facet("figure"), "row": facet("page_set")},
        "spec": {
            "width": PANEL,
            "height": PANEL,
            "mark": {"type": "line", "point": True},
            "encoding": {"x": x, "y": y, "color": colour},
        },
    }


def main() -> None:
    """Print or write the tables, and write the plot if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.studies.scale.summary", description=__doc__
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files, one a size")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="instead of the screen")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    sizes = read_results(options.results)
    every = [point for size in sizes for point in points(size)]
    if not every:
        raise UserError(f"{options.results[0]}: holds no measured recipe yet")
    if options.table:
        write_file(options.table, tables(sizes).encode())
    else:
        print(tables(sizes), end="")
    if options.plot:
        write_file(options.plot, svg(chart(every)).encode())


if __name__ == "__main__":
    run(main)
