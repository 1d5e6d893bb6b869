"""Write the figures of README.md and docs/ from committed files: ``python docs/figures.py``.

A figure stands between two comments, in the middle of a line or as a block of its own::

    nDCG@5 <!-- figure ndcg-original -->0.9104<!-- end -->

Its name is that of a function or a value below, which says which file and which key it comes from.
Without an option the files are rewritten; ``--check`` changes nothing and fails, naming each figure
that differs. Sources are ``metrics/reference/`` (the authors' results; no run writes there),
``metrics/size/``, ``metrics/scale/``, ``metrics/gguf/``, ``metrics/engines/``, ``metrics/stores.json``,
``metrics/demo_training.json`` and the ablation's metrics.
"""

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from colqwen3.serving.humming_tiles import (
    LARGE_FROM,
    PROCESSORS,
    Product,
    Range,
    replace_tiles,
)

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"(?<!`)<!-- figure (?P<name>\S+) -->(?P<text>.*?)<!-- end -->", re.DOTALL)
RECIPES = ("small", "w4g128", "rtn-w4g128")
ABLATION = ROOT / "demo/studies/ablation"
_, DEFAULT, ROUNDING = RECIPES
ENGINES = ("transformers", "mteb", "colpali-engine", "vllm")

FIGURES: dict[str, Callable[[], str]] = {}
"""Name of a figure -> what writes it."""


def figure(function: Callable[[], str]) -> Callable[[], str]:
    """Register a figure under the function's name, with dashes for underscores."""
    FIGURES[function.__name__.replace("_", "-")] = function
    return function


@cache
def read(path: str) -> Any:
    """Return a committed JSON file."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def quality(recipe: str) -> Any:
    """Return metrics/reference/quality/<recipe>.json."""
    return read(f"metrics/reference/quality/{recipe}.json")


def summary(recipe: str) -> Any:
    """Return metrics/reference/summary/<recipe>.json."""
    return read(f"metrics/reference/summary/{recipe}.json")


def gpu(step: str) -> Any:
    """Return a step of metrics/size/cuda.json."""
    return read("metrics/size/cuda.json")["steps"][step]


def served(step: str) -> Any:
    """Return a step of metrics/size/serving-cuda.json."""
    return read("metrics/size/serving-cuda.json")["steps"][step]


def cpu(step: str) -> Any:
    """Return a step of metrics/size/cpu.json."""
    return read("metrics/size/cpu.json")["steps"][step]


def ablation(recipe: str) -> Any:
    """Return the metrics of a recipe of the ablation on the first evaluation set."""
    return read(f"demo/studies/ablation/metrics/{recipe}.json")["evaluation"]


def table(*rows: tuple[str, ...]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def loss(metrics: Mapping[str, Any], kind: str) -> float:
    """Return 1 - mean cosine of the tokens of ``pages`` or ``queries``."""
    return 1 - float(metrics[kind]["cosine"]["mean"])


def with_interval(values: Mapping[str, float]) -> str:
    """Return a difference with its 95 % interval."""
    return f"{values['difference']:+.4f} [{values['low']:+.4f}, {values['high']:+.4f}]"


def gb(count: float, digits: int = 1) -> str:
    """Return bytes as GB (10^9)."""
    return f"{count / 1e9:.{digits}f} GB"


def times(ratio: float) -> str:
    """Return a ratio, one far below 1 with one digit."""
    return f"{ratio:{'.2f' if ratio >= 0.01 else '.1g'}}\N{MULTIPLICATION SIGN}"


# ---- the demo: indexes and stores ----------------------------------------------------------------
@figure
def index_formats() -> str:
    """Bytes per page, nDCG@5 and overlap of each format; metrics/reference/index/<recipe>.json."""
    both = {recipe: read(f"metrics/reference/index/{recipe}.json")["formats"] for recipe in RECIPES}
    formats = both[DEFAULT]

    def cells(values: Mapping[str, float]) -> tuple[str, str]:
        return f"{values['ndcg_at_5']:.4f}", f"{100 * values['top5_overlap']:.1f} %"

    head = ("format", "bytes per page", "original: nDCG@5", "top-5 overlap")
    for recipe in RECIPES:
        head += (f"`{recipe}`: nDCG@5", "top-5 overlap")
    rows = [
        (
            f"`{name}`",
            f"{values['bytes_per_page']:,}",
            *cells(values["original"]),
            *(cell for recipe in RECIPES for cell in cells(both[recipe][name]["quantized"])),
        )
        for name, values in sorted(
            formats.items(), key=lambda item: item[1]["bytes_per_page"], reverse=True
        )
    ]
    return table(head, *rows)


@figure
def stores() -> str:
    """NDCG@5 and overlap of the stores of docs/corpus.md; metrics/stores.json."""
    results = read("metrics/stores.json")
    rows = [
        (
            f"{name} {values['version']}",
            f"{values['ndcg_at_5']:.4f}",
            f"{100 * values['top5_overlap']:.1f} %",
        )
        for name, values in sorted(results["stores"].items(), key=lambda item: item[0].lower())
    ]
    exact = ("exact MaxSim", f"{results['exact']['ndcg_at_5']:.4f}", "100 %")
    return table(("", "nDCG@5", "top-5 overlap with exact"), exact, *rows)


@figure
def corpus_cards() -> str:
    """Rates of one and two cards; metrics/size/corpus-cuda-2.json."""
    cards = read("metrics/size/corpus-cuda-2.json")["steps"]["gpus"]
    one, two = (cards[count]["pages_per_second"] for count in "12")
    return f"{one:.1f} pages per second on one card, {two:.1f} on two: {times(cards['speedup'])}"


@figure
def corpus_bytes() -> str:
    """Return what two other cards gave, with equal bytes; metrics/size/corpus-cuda-2-bytes.json."""
    results = read("metrics/size/corpus-cuda-2-bytes.json")
    cards = results["steps"]["gpus"]
    if not cards["same_bytes"]:
        raise ValueError("the shards of two cards differ; say so in docs/corpus.md")
    return f"{results['steps']['draw']['pages']} pages, {times(cards['speedup'])} one card's rate"


@figure
def corpus_kills() -> str:
    """Return what a killed run of the original gave; metrics/size/corpus-kills.json."""
    return _killed("metrics/size/corpus-kills.json")


@figure
def corpus_kills_4bit() -> str:
    """Return what a killed run of 4-bit weights gave; metrics/size/corpus-kills-4bit.json."""
    return _killed("metrics/size/corpus-kills-4bit.json")


def _killed(path: str) -> str:
    results = read(path)
    killed = results["killed"]
    kills = sum(run["killed_at_shards"] is not None for run in killed["runs"])
    if not results["passed"]:
        raise ValueError("a killed run gave other bytes; say so in docs/corpus.md")
    return (
        f"{results['pages']:,} pages, {results['damaged']} of them damaged, in {results['shards']} shards: "
        f"killed {kills} times, {killed['seconds']:.0f} s instead of "
        f"{results['undisturbed']['seconds']:.0f} s"
    )


@figure
def corpus_cost() -> str:
    """Rates and what a million pages take; metrics/size/corpus-cuda.json."""
    results = read("metrics/size/corpus-cuda.json")
    steps, gpu = results["steps"], results["machine"]["gpu"].split(",")[0]
    alone, head = steps["runtime"], ("", "from PNG", "from PDF (scans)")
    own = (
        f"{alone['pages_per_second']:.1f} pages per second in batches of {alone['pages_per_batch']}"
    )
    ways = [steps[kind] for kind in ("png", "pdf")]
    prepared = [steps["prepare"][kind]["median"] for kind in ("png", "pdf")]
    rates = [way.get("steady_pages_per_second", way["pages_per_second"]) for way in ways]

    def row(name: str, *cells: str) -> tuple[str, ...]:
        return name, *cells

    rows = (
        row("pages per second", *(f"{rate:.1f}" for rate in rates)),
        row("by the runtime's own rate", *(times(r / alone["pages_per_second"]) for r in rates)),
        row("CPU of a page's preparation", *(f"{ms:.0f} ms" for ms in prepared)),
        row("host memory, peak", *(f"{way['host_memory']['peak_gb']:.1f} GB" for way in ways)),
        row("GPU hours per million pages", *(f"{1e6 / rate / 3600:.1f}" for rate in rates)),
        row(
            "CPU cores per GPU",
            *(f"{rate * ms / 1000:.1f}" for rate, ms in zip(rates, prepared, strict=True)),
        ),
        row("disk per million pages", *(gb(1e6 * way["bytes_per_page"], 0) for way in ways)),
    )
    return f"{gpu}, weights: {results['weights']}; the runtime alone {own}.\n\n{table(head, *rows)}"


@figure
def corpus_preparation() -> str:
    """Return what preparing a page takes of a CPU core, and what decoding and resizing do alone."""
    results = read("metrics/size/corpus-cpu.json")
    times_of = {key: value["median"] for key, value in results["steps"]["prepare"].items()
                if isinstance(value, dict)}  # fmt: skip
    whole = {
        "without colour": ("png_without_colour", None),
        "text, a little colour": ("png", "decode_png"),
        "colour and noise in every pixel": ("png_of_photographs", "decode_png_of_photographs"),
    }
    rows = []
    for name, (key, decoding) in whole.items():
        floor = "" if decoding is None else f"{times_of[decoding] + times_of['resize']:.0f} ms"
        decoded = "" if decoding is None else f"{times_of[decoding]:.0f} ms"
        rows.append((name, f"{times_of[key]:.0f} ms", decoded, floor))
    return table(("page", "preparation", "decoding alone", "decoding and resizing alone"), *rows)


# ---- the demo: quality ---------------------------------------------------------------------------
@figure
def gguf() -> str:
    """Cosine, nDCG@5, bytes and time of each model in llama.cpp; metrics/gguf/demo.json."""
    rows = []
    for name, model in read("metrics/gguf/demo.json")["models"].items():
        ndcg, cosine, time = (
            model[key] for key in ("ndcg_at_5", "cosine", "time_to_torch_float32")
        )
        rows.append(
            (
                f"{name}, {'F16' if name == 'original' else 'Q4_0'}",
                f"{sum(model['bytes'].values()) / 1e6:.1f} MB",
                f"{ndcg['llama.cpp']:.4f} ({ndcg['torch']:.4f})",
                *(f"{cosine[kind]['minimum']:.5f}" for kind in ("queries", "pages")),
                *(f"{time[kind]:.1f}" for kind in ("query", "page")),
            )
        )
    head = ("", "bytes", "nDCG@5 (torch)", "minimum cosine of a query token", "of a page token")
    return table((*head, "time of a query", "of a page"), *rows)


@figure
def gguf_size() -> str:
    """Memory and bytes at true size; metrics/gguf/true_size.json."""
    size = read("metrics/gguf/true_size.json")
    total = sum(size["bytes"].values())
    return (
        f"**{size['weights']}** (`{size['command']}`; {size['machine']['cores']} CPU cores): "
        f"both files take {total / 1e9:.2f} GB, foretold {size['expected_tensor_bytes'] / 1e9:.2f}; "
        f"a conversion peaks at {size['convert']['peak_resident_bytes'] / 1e9:.1f} GB; queries take "
        f"{size['queries']['peak_resident_bytes'] / 1e9:.1f} GB, of which all but "
        f"{size['queries']['peak_own_bytes'] / 1e9:.1f} GB is the mapped file."
    )


def engine(name: str) -> Any:
    """Return metrics/engines/<name>.json."""
    return read(f"metrics/engines/{name}.json")


def minimum(row: Mapping[str, Any], kind: str) -> str:
    """Return the minimum cosine of a query's or page's tokens in a row of an engine."""
    value = row.get(f"{kind}_minimum", row.get("minimum"))
    return "" if value is None else f"{value:.5f}"


def outcome(row: Mapping[str, Any]) -> str:
    """Return in a few words what an engine made of a folder."""
    if row["result"] == "runs":
        return "runs"
    reason = "a shape does not fit" if "Attempted to load" in row["result"] else ""
    reason = "by name" if "lacks the tensor" in row["result"] else reason
    return f"rejected: {reason}" if reason else row["result"]


@figure
def engines() -> str:
    """Engine by format: minimum cosines and what is rejected; metrics/engines/."""
    rows = [("engine", "folder", "computes in", "query tokens", "page tokens", "result")]
    for row in engine("transformers")["rows"]:
        name = f"transformers {row['version']}"
        cosines = (minimum(row, "query"), minimum(row, "page"))
        rows.append((name, f"`{row['format']}`", row["dtype"], *cosines, outcome(row)))
    versions = engine("mteb")["versions"]
    names = {
        "ColQwen3Wrapper": f"mteb {versions['mteb']}, its own wrapper",
        "MultiVectorWrapper": f"sentence-transformers {versions['sentence-transformers']}, through mteb",
    }
    for row in engine("mteb")["rows"]:
        ndcg = f"nDCG@5 {row['ndcg_at_5']:.4f}, ours {row['ndcg_at_5_of_evaluate']:.4f}"
        rows.append((names[row["route"]], f"`{row['format']}`", row["dtype"], "", "", ndcg))
    name = f"colpali-engine {engine('colpali-engine')['versions']['colpali-engine']}"
    for row in engine("colpali-engine")["rows"]:
        kind = row["format"].replace("auto_round", "`auto_round`")
        cosines = (minimum(row, "query"), minimum(row, "page"))
        rows.append((name, kind, row["dtype"], *cosines, outcome(row)))
    for row in engine("vllm")["rows"]:
        name = f"vLLM {row['version']}, {row['mode']}{', plugin' if row['plugin'] else ''}"
        kind = row["format"].replace("auto_", "`auto_").replace("llm_compressor", "`llm_compressor")
        kind = re.sub(r"`\w+", r"\g<0>`", kind)
        cosines = (minimum(row, "query"), minimum(row, "page"))
        rows.append((name, kind, row["dtype"], *cosines, outcome(row)))
    return table(*rows)


@figure
def engines_date() -> str:
    """When the engines were checked."""
    return max(engine(name)["date"] for name in ENGINES)


@figure
def vllm_bias_loss() -> str:
    """Mean page loss in stock vLLM of the published layout; metrics/engines/vllm.json."""
    return f"{published_row(plugin=False)['page_loss']:.5f}"


@figure
def vllm_noise() -> str:
    """Mean page loss by bfloat16 in vLLM and in transformers, of the released default format."""
    (row,) = (
        row
        for row in engine("vllm")["rows"]
        if row["mode"] == "server" and row["format"] == "auto_round"
    )
    return f"{row['page_loss']:.6f}, in transformers {row['page_loss_of_transformers']:.6f}"


@figure
def uneven_resize() -> str:
    """Minimum cosine of a page that is shrunk one way and enlarged the other, in float32."""
    return f"{published_row(plugin=True)['page_resized_unevenly_minimum']:.4f}"


def published_row(plugin: bool) -> Any:
    """Return the first row of the original in the published layout."""
    return next(
        row
        for row in engine("vllm")["rows"]
        if row["format"] == "published" and row["plugin"] == plugin
    )


@figure
def verdicts() -> str:
    """Return the small table of the README."""
    rows = [("recipe", "verdict", "page loss", "query loss", "nDCG@5", "first page unchanged")]
    for recipe in RECIPES:
        metrics = quality(recipe)
        ndcg = metrics["retrieval"]["ndcg_at_5"]
        rows.append(
            (
                f"`{recipe}`", f"**{summary(recipe)['verdict']}**",
                f"{loss(metrics, 'pages'):.5f}", f"{loss(metrics, 'queries'):.5f}",
                f"{ndcg['original']:.4f} → {ndcg['quantized']:.4f}",
                f"{100 * metrics['retrieval']['top1_agreement']:.1f} %",
            )
        )  # fmt: skip
    return table(*rows)


@figure
def demo_quality() -> str:
    """Return the whole table of docs/results.md."""
    both = [quality(recipe) for recipe in RECIPES]

    def row(name: str, original: str, cell: Callable[[Any], str]) -> tuple[str, ...]:
        return (name, original, *(cell(metrics) for metrics in both))

    def ndcg(index: str) -> Callable[[Any], str]:
        def cell(metrics: Any) -> str:
            values = metrics[index]["ndcg_at_5"]
            return f"{values['quantized']:.4f}; {with_interval(values)}"

        return cell

    first = both[0]
    original = first["retrieval"]
    size = first["size"]
    return table(
        ("", "original", *(f"`{recipe}`" for recipe in RECIPES)),
        ("verdict", "", *(summary(recipe)["verdict"] for recipe in RECIPES)),
        row("page loss", "0", lambda m: f"{loss(m, 'pages'):.5f}"),
        row("page loss of the worst 1 % of tokens, at least", "",
            lambda m: f"{1 - m['pages']['cosine']['p01']:.4f}"),
        row("query loss", "0", lambda m: f"{loss(m, 'queries'):.5f}"),
        row("nDCG@5; difference [95 %]", f"{original['ndcg_at_5']['original']:.4f}",
            ndcg("retrieval")),
        row("the same, quantized queries on the original's index",
            f"{original['ndcg_at_5']['original']:.4f}", ndcg("mixed_index")),
        row("recall@1", f"{original['recall_at_1']['original']:.4f}",
            lambda m: f"{m['retrieval']['recall_at_1']['quantized']:.4f}"),
        row("queries whose first page is unchanged", "",
            lambda m: f"{100 * m['retrieval']['top1_agreement']:.1f} %"),
        row("five best pages that stayed", "",
            lambda m: f"{100 * m['retrieval']['top5_overlap']:.1f} %"),
        row("bytes of the language model's layers", f"{size['language_model']['original']:,}",
            lambda m: f"{m['size']['language_model']['quantized']:,}"
                      f" ({m['size']['language_model']['reduction_percent']:.1f} % less)"),
        row("bytes of the checkpoint", f"{size['files']['original']:,}",
            lambda m: f"{m['size']['files']['quantized']:,}"
                      f" ({m['size']['files']['reduction_percent']:.1f} % less)"),
    )  # fmt: skip


@figure
def metrics_show() -> str:
    """Return what `dvc metrics show` prints of the reference results."""
    rows = [summary(recipe) for recipe in RECIPES]
    names = list(rows[0])
    cells = [["Path", *names]]
    for recipe, row in zip(RECIPES, rows, strict=True):
        cells.append([f"metrics/summary/{recipe}.json", *(str(row[name]) for name in names)])
    widths = [max(len(line[place]) for line in cells) for place in range(len(cells[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    return "```\n" + "\n".join(lines) + "\n```"


@figure
def metrics_diff() -> str:
    """Return `dvc metrics diff` of rounding with groups of 32 instead of 128, from the ablation."""
    pair = [ablation(recipe) for recipe in ("rtn-w4g128", "rtn-w4g32")]
    figures: dict[str, Callable[[Any], float]] = {
        "cos_page": lambda m: m["pages"]["cosine"]["mean"],
        "cos_query": lambda m: m["queries"]["cosine"]["mean"],
        "mb": lambda m: m["size"]["files"]["quantized"] / 1e6,
        "ndcg5": lambda m: m["retrieval"]["ndcg_at_5"]["quantized"],
        "recall1": lambda m: m["retrieval"]["recall_at_1"]["quantized"],
        "top1_same": lambda m: m["retrieval"]["top1_agreement"],
    }
    lines = [f"{'Metric':<11}{'HEAD':<10}{'workspace':<11}Change"]
    for name, value in figures.items():
        before, after = (round(value(metrics), 5) for metrics in pair)
        lines.append(f"{name:<11}{before:<10}{after:<11}{after - before:.5f}")
    return "```\n" + "\n".join(lines) + "\n```"


@figure
def demo_pages() -> str:
    """Return how well the demo model itself searches."""
    after = read("metrics/demo_training.json")["measured_after_training"]
    names = {
        "evaluation": "`demo/pages/evaluation`",
        "evaluation2": "`demo/pages/evaluation2`, pages that look alike",
    }
    rows = [("pages", "nDCG@5", "chance")]
    for key, name in names.items():
        values = after["demo_pages"][key]
        described = f"{name}: {values['pages']} pages, {values['queries']} queries"
        rows.append((described, f"{values['ndcg_at_5']:.2f}", f"{values['chance_ndcg_at_5']:.2f}"))
    for values in after["real_manual_pages"]:
        described = (
            f"real manual `{values['document']}`: {values['pages']} pages, titles as queries"
        )
        rows.append((described, f"{values['ndcg_at_5']:.2f}", f"{values['chance_ndcg_at_5']:.2f}"))
    return table(*rows)


@figure
def demo_card() -> str:
    """Return the figures of the demo model's own card."""
    training = read("metrics/demo_training.json")
    held_out, after = training["held_out"][-1], training["measured_after_training"]
    sets = [
        ("held-out small pages (256 x 128)", held_out["small_pages"]),
        ("held-out large pages (448 x 576)", held_out["large_pages"]),
        ("`demo/pages/evaluation`", after["demo_pages"]["evaluation"]),
        ("`demo/pages/evaluation2`, which look alike in fours", after["demo_pages"]["evaluation2"]),
        ("`demo/pages/calibration`", after["demo_pages"]["calibration"]),
    ]
    described = [
        (f"{values['pages']} pages, {values['queries']} queries: {name}", values)
        for name, values in sets
    ]
    described += [
        (f"{values['pages']} pages, a title each: manual {values['document']}", values)
        for values in after["real_manual_pages"]
    ]
    keys = ("ndcg_at_5", "recall_at_1", "chance_ndcg_at_5")
    rows = [(name, *(f"{values[key]:.3f}" for key in keys)) for name, values in described]
    return table(("pages", "nDCG@5", "recall@1", "chance nDCG@5"), *rows)


# ---- the ablation --------------------------------------------------------------------------------
def ablation_tables() -> dict[str, str]:
    """Return the ablation's own tables, by dataset."""
    from demo.studies.ablation.study import METRICS, load_ablation
    from demo.studies.ablation.study import table as ablation_table

    metrics = {
        path.stem: json.loads(path.read_text())
        for recipe in load_ablation().recipes
        if (path := ROOT / METRICS / f"{recipe}.json").exists()
    }
    return {
        dataset: ablation_table({name: values[dataset] for name, values in metrics.items()})
        for dataset in ("evaluation", "evaluation2")
    }


@figure
def ablation_evaluation() -> str:
    """Return the ablation on the first evaluation set."""
    return ablation_tables()["evaluation"]


@figure
def ablation_evaluation2() -> str:
    """Return the ablation on the second evaluation set."""
    return ablation_tables()["evaluation2"]


def _seeds(group: str, kind: str) -> float:
    """Return the mean loss of the recipes of one row of the ablation."""
    paths = sorted((ABLATION / "metrics").glob(f"{group}-seed*.json"))
    losses = [loss(json.loads(path.read_text())["evaluation"], kind) for path in paths]
    return sum(losses) / len(losses)


PAGE_SETS = ("evaluation", "evaluation2")


def frontiers() -> dict[str, dict[str, dict[str, Any]]]:
    """Return loss against bytes of the sizes measured: size -> page set -> contender -> its point."""
    from demo.studies.scale.frontier import points, read_frontiers

    return {
        shape: {
            name: {point["recipe"]: point for point in points(results, name)} for name in PAGE_SETS
        }
        for shape, results in read_frontiers(ROOT / "metrics/scale").items()
    }


@figure
def frontier() -> str:
    """Return loss against bytes on both evaluation sets, smallest first, a table a size."""
    tables = []
    head = (
        "bytes",
        "of 16 bits",
        "pages, set 1",
        "queries, set 1",
        "pages, set 2",
        "queries, set 2",
    )
    for shape, sets in frontiers().items():
        rows = []
        for recipe, point in sets[PAGE_SETS[0]].items():
            losses = (
                sets[name][recipe][kind] for name in PAGE_SETS for kind in ("pages", "queries")
            )
            size = f"{point['mb']:.2f} MB", f"{point['share']:.0%}"
            rows.append((f"`{recipe}`", *size, *(f"{value:.6f}" for value in losses)))
        tables.append(table((f"`{shape}`", *head), *rows))
    return "\n\n".join(tables)


@figure
def frontier_ratios() -> str:
    """Return bytes and losses of one recipe over another's, the worse page set, a row a size."""
    pairs = (
        ("small", "w4"), ("small-e2e", "w4"), ("attention8", "w4"), ("bytes-w3", "w3"),
        ("bytes-small", "small"), ("b30", "w3"),
    )  # fmt: skip
    rows = []
    for shape, sets in frontiers().items():
        for one, other in pairs:
            if not {one, other} <= sets[PAGE_SETS[0]].keys():
                continue
            size = sets[PAGE_SETS[0]][one]["mb"] / sets[PAGE_SETS[0]][other]["mb"]
            worst = (
                max(sets[name][one][kind] / sets[name][other][kind] for name in PAGE_SETS)
                for kind in ("pages", "queries")
            )
            rows.append((f"`{shape}`", f"`{one}` / `{other}`", *map(times, (size, *worst))))
    return table(("size", "recipes", "bytes", "page loss", "query loss"), *rows)


@figure
def sensitivity() -> str:
    """Return the loss of pages and queries with one part of the demo model quantized."""
    measured = read("metrics/scale/frontier-demo.json")["sensitivity"]
    rows = []
    for part, losses in measured.items():
        if part.startswith("vision_block"):
            continue
        cells = (
            f"{losses[bits]['pages']:.1e} / {losses[bits]['queries']:.1e}"
            for bits in ("2", "3", "4", "8")
        )
        rows.append((f"`{part}`", *cells))
    return table(("loss of pages / queries", "2 bits", "3", "4", "8"), *rows)


@figure
def sensitivity_of_layers() -> str:
    """Return how far decoder layers differ at 3 bits: the most sensitive over the least, a row a size."""
    from demo.studies.scale.frontier import read_frontiers

    items = ("qkv", "o", "gate_up", "down")
    rows = []
    for shape, results in read_frontiers(ROOT / "metrics/scale").items():
        cells = []
        for item in items:
            losses = [
                loss["3"]
                for part, loss in results["sensitivity"].items()
                if part.startswith("layers.") and part.endswith(f".{item}")
            ]
            ratios = (
                max(loss[kind] for loss in losses) / min(loss[kind] for loss in losses)
                for kind in ("pages", "queries")
            )
            cells.append(" / ".join(f"{ratio:.1f}" for ratio in ratios))
        rows.append((f"`{shape}`", *cells))
    return table(("size, pages / queries", *(f"`{item}`" for item in items)), *rows)


@figure
def smaller_at_true_size() -> str:
    """Return bytes, time and memory of smaller checkpoints at true size."""
    names = {
        "rtn": "4 bits, all else 16-bit",
        "rtn-small": "and 8-bit token embeddings, vision attention and mergers",
        "rtn-8": "and 8-bit token embeddings and the whole vision tower",
        "rtn-8-e4": "the same with 4-bit token embeddings",
    }
    rows = []
    for step, what in names.items():
        figures = cpu(step)
        rows.append(
            (
                what,
                f"{figures['files_bytes'] / 1e9:.3f} GB",
                f"{figures['bytes_off']:.4%}",
                f"{figures['seconds']:.0f} s",
                f"{figures['peak_own_bytes'] / 1e9:.2f} GB",
            )
        )
    return table(("weights", "files", "off what was foretold", "time", "memory of its own"), *rows)


@figure
def small_on_a_gpu() -> str:
    """Return what tuning and serving with everything in 8 bits but the language model takes."""
    tuned = read("metrics/size/tune-small-h100.json")["steps"]["tune-small"]
    small = served("serve-small")
    return (
        f"tuning the whole tower and {tuned['layers']} decoder layers, {tuned['iters']} steps, "
        f"{tuned['seconds']:.0f} s and {gb(tuned['gpu_peak_bytes'])} of GPU memory; served by the "
        f"runtime, {small['loaded_bytes'] / 1e9:.2f} GB loaded, {small['loaded_to_files']:.3f}"
        f"\N{MULTIPLICATION SIGN} the files, and {small['gpu_peak_bytes'] / 1e9:.2f} GB at its peak "
        "with a query and a page recorded"
    )


def h200(step: str) -> Any:
    """Return a step of metrics/size/cuda-h200.json."""
    return read("metrics/size/cuda-h200.json")["steps"][step]


@figure
def sensitivity_time() -> str:
    """Return what the sensitivity of a model of true size takes."""
    step = h200("sensitivity")
    return f"{step['seconds']:.0f} s and {gb(step['gpu_peak_bytes'])} of GPU memory"


@figure
def gptq_at_true_size() -> str:
    """Return what GPTQ takes at true size."""
    step = h200("gptq")
    return f"{step['seconds']:.0f} s and {gb(step['gpu_peak_bytes'])} of GPU memory"


@figure
def end_to_end_memory() -> str:
    """Return the most memory that a card had in use during end-to-end steps at true size."""
    used = read("metrics/size/end-to-end-h100.json")["memory_mib"]
    return gb(max(used) * 2**20)


@figure
def end_to_end_time() -> str:
    """Return the time of 200 end-to-end steps at true size, extrapolated from the first of them."""
    time = read("metrics/size/end-to-end-h100.json")["end_to_end_time"]
    rate = time["steps_per_second"]
    return (
        f"{time['steps_done']} steps took {1 / rate:.2f} s each, "
        f"so about {200 / rate / 60:.1f} minutes for 200"
    )


@figure
def hessian_true_size() -> str:
    """Return time and memory of GPTQ by the whole model at true size."""
    step = read("metrics/size/gptq-model-h100.json")["steps"]["gptq-model"]
    return (
        f"{step['seconds'] / 60:.1f} minutes, at most {gb(step['gpu_peak_bytes'])} of GPU memory and "
        f"{gb(step['peak_own_bytes'])} of the host's"
    )


@figure
def pages_against_rounding() -> str:
    """Return the page loss of 16 pages + 16 queries over that of rounding, 4 bits."""
    return f"{_seeds('mixed-w4g128', 'pages') / loss(ablation('rtn-w4g128'), 'pages'):.2f}"


@figure
def pages_against_text() -> str:
    """Return the page loss of 16 pages + 16 queries over that of text, 4 bits."""
    return f"{_seeds('mixed-w4g128', 'pages') / _seeds('text-w4g128', 'pages'):.2f}"


@figure
def default_against_rounding() -> str:
    """Return the page loss of the default set and iterations over that of rounding, 4 bits."""
    return f"{_seeds('more-200-w4g128', 'pages') / loss(ablation('rtn-w4g128'), 'pages'):.2f}"


@figure
def pages_only_queries() -> str:
    """Return the query loss of 16 pages over that of 16 pages + 16 queries, tuned alike, 4 bits."""
    pages, both = (_seeds(f"{name}-naive-w4g128", "queries") for name in ("pages", "mixed"))
    return f"{pages / both:.1f}"


@figure
def fewer_pages() -> str:
    """Return the page loss of 16 pages + 16 queries over that of the default, 4 bits."""
    return f"{_seeds('mixed-w4g128', 'pages') / _seeds('more-200-w4g128', 'pages'):.1f}"


@figure
def fewer_queries() -> str:
    """Return the same for the query loss."""
    return f"{_seeds('mixed-w4g128', 'queries') / _seeds('more-200-w4g128', 'queries'):.1f}"


@figure
def default_against_text_3_bits() -> str:
    """Return the same over that of text with as many iterations, 3 bits."""
    return f"{_seeds('more-200-w3g128', 'pages') / _seeds('text-200-w3g128', 'pages'):.2f}"


# ---- the scale study -----------------------------------------------------------------------------
MODELS = ("1m", "demo", "39m", "150m")
PAGE_SETS = ("evaluation", "evaluation2")
WIDTHS = (4, 3)
WAYS = {
    "rounding": "nothing: rounding",
    "text": "16 passages",
    "naive": "96 queries + 48 pages, `deepstack: false`",
    "mixed": "**96 queries + 48 pages: the default**",
    "mixed-passages32": "the default + 32 passages",
    "mixed-passages64": "the default + 64 passages",
}
"""Contenders of the scale study, in words."""


BESIDE = "demo-cpu"
"""The demo model on a CPU: AutoRound beside GPTQ."""
GPTQ_WAYS = {
    "rounding": "rounding",
    "gptq": "GPTQ, 96 queries + 48 pages",
    "mixed": "AutoRound, the same",
    "gptq-passages32": "GPTQ, 32 passages more",
    "mixed-passages32": "AutoRound, 32 passages more",
}


BEYOND = tuple(
    f"beyond-{model}"
    for model in ("demo", "39m", "150m")
    if (ROOT / f"metrics/scale/beyond-{model}.json").exists()
)
"""Models on which end-to-end tuning was measured."""
BEYOND_WAYS = {
    "rounding": "rounding",
    "text": "AutoRound, 16 passages",
    "mixed": "AutoRound: the default",
    "mixed-e2e-scales": "AutoRound, then scales end to end",
    "mixed-e2e": "AutoRound, then codes and scales",
    "gptq": "GPTQ, the samples of the default",
    "gptq-e2e-scales": "GPTQ, then scales end to end",
    "gptq-e2e": "**GPTQ, then codes and scales**",
    "gptq-e2e-600": "the same by 600 steps",
    "gptq-passages32-e2e": "the same by 200 steps, 32 passages more",
}


def study_loss(model: str, contender: str, bits: int, page_set: str, kind: str) -> float:
    """Return a loss in the scale study, the mean over seeds."""
    losses = [
        recipe["loss"][page_set][kind]
        for recipe in read(f"metrics/scale/{model}.json")["recipes"].values()
        if (recipe["contender"], recipe["bits"]) == (contender, bits)
    ]
    return float(sum(losses) / len(losses))


def _loss_cell(model: str, contender: str, bits: int, kind: str) -> str:
    """Return a loss on both page sets, in 1e-6."""
    from demo.studies.scale.summary import UNIT, significant

    losses = (study_loss(model, contender, bits, page_set, kind) for page_set in PAGE_SETS)
    return " / ".join(significant(loss / UNIT) for loss in losses)


def _losses(model: str, contender: str) -> tuple[str, ...]:
    """Return cells of losses: of pages by width, then of queries; none if it was not measured.

    A width that was not measured has an empty cell.
    """
    recipes = read(f"metrics/scale/{model}.json")["recipes"].values()
    measured = {recipe["bits"] for recipe in recipes if recipe["contender"] == contender}
    if not measured:
        return ()
    return tuple(
        _loss_cell(model, contender, bits, kind) if bits in measured else ""
        for kind in ("pages", "queries")
        for bits in WIDTHS
    )


def study_ratios(
    contender: str,
    other: str,
    kind: str,
    widths: tuple[int, ...] = WIDTHS,
    other_bits: int | None = None,
    models: tuple[str, ...] = MODELS,
) -> list[float]:
    """Return the losses of one contender over those of another, by width, model and page set."""
    return [
        study_loss(model, contender, bits, page_set, kind)
        / study_loss(model, other, other_bits or bits, page_set, kind)
        for bits in widths
        for model in models
        for page_set in PAGE_SETS
    ]


def _between(values: list[float], digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _percent_between(ratios: list[float]) -> str:
    """Return by how many percent the ratios differ from 1, as a range of signed numbers."""
    low, high = (round(100 * (ratio - 1)) for ratio in (min(ratios), max(ratios)))
    return f"{_signed(low)} to {_signed(high)} %"


def _signed(percent: int) -> str:
    return f"{percent:+d}" if percent else "0"


@figure
def scale_models() -> str:
    """Return the study models and their training."""
    head: tuple[str, ...] = ("study model", "parameters", "text layers x width", "vision blocks x width",
            "deepstack after blocks", "training on one H100", "nDCG@5: evaluation", "evaluation2")  # fmt: skip
    rows = [head]
    for model in MODELS:
        values = read(f"metrics/scale/{model}.json")
        depth, training, sets = values["depth"], values["training"], values["page_sets"]
        rows.append(
            (
                f"`{model}`", f"{values['parameters']['total']:,}",
                f"{depth['text_layers']} x {depth['text_hidden']}",
                f"{depth['vision_blocks']} x {depth['vision_hidden']}",
                ", ".join(map(str, depth["deepstack"])),
                f"{training['wall_seconds']} s, {training['steps']:,} steps, "
                f"{training['page_views']:,} pages seen",
                *(f"{sets[name]['ndcg_at_5']:.2f}" for name in PAGE_SETS),
            )
        )  # fmt: skip
    return table(*rows)


def _scale_losses(bits: int) -> str:
    """Return losses and their ratios, one row per study model and contender, both page sets."""
    from demo.studies.scale.summary import UNIT, significant

    def pair(cell: Callable[[str], str]) -> str:
        return " / ".join(map(cell, PAGE_SETS))

    def losses(model: str, contender: str, kind: str) -> str:
        return pair(lambda s: significant(study_loss(model, contender, bits, s, kind) / UNIT))

    def ratio(model: str, contender: str, other: str, kind: str) -> str:
        if contender == other:
            return ""
        return pair(
            lambda s: (
                f"{study_loss(model, contender, bits, s, kind) / study_loss(model, other, bits, s, kind):.2f}"
            )
        )

    rows: list[tuple[str, ...]] = [
        ("study model", "tuned on", "page loss, 1e-6", "of rounding's", "query loss, 1e-6",
         "of rounding's", "of 16 passages'")
    ]  # fmt: skip
    for model in MODELS:
        parameters = read(f"metrics/scale/{model}.json")["parameters"]["total"]
        for contender, words in WAYS.items():
            rows.append(
                (
                    f"`{model}`, {parameters / 1e6:.1f}M", words,
                    losses(model, contender, "pages"),
                    ratio(model, contender, "rounding", "pages"),
                    losses(model, contender, "queries"),
                    ratio(model, contender, "rounding", "queries"),
                    ratio(model, contender, "text", "queries"),
                )
            )  # fmt: skip
    return table(*rows)


@figure
def scale_losses_4() -> str:
    """Return the scale study at 4 bits."""
    return _scale_losses(4)


@figure
def scale_losses_3() -> str:
    """Return the scale study at 3 bits."""
    return _scale_losses(3)


@figure
def scale_targets() -> str:
    """Return the worst ratios of the default by study model, over both page sets and widths."""
    rows: list[tuple[str, ...]] = [
        ("study model", "page loss of rounding's, 4 bits", "3 bits",
         "query loss of 16 passages', 4 bits", "3 bits")
    ]  # fmt: skip
    for model in MODELS:
        parameters = read(f"metrics/scale/{model}.json")["parameters"]["total"]
        cells = (
            f"{max(study_ratios('mixed', other, kind, (bits,), models=(model,))):.2f}"
            for other, kind in (("rounding", "pages"), ("text", "queries"))
            for bits in WIDTHS
        )
        rows.append((f"`{model}`, {parameters / 1e6:.1f}M", *cells))
    return table(*rows)


@figure
def scale_three_bits() -> str:
    """Return 3 bits with the default over 4 bits, by study model."""
    rows: list[tuple[str, ...]] = [
        ("study model", "page loss of 4-bit rounding's", "query loss of 4-bit rounding's",
         "query loss of 4-bit tuning on 16 passages", "the same with 64 passages more",
         "page loss of the 4-bit default")
    ]  # fmt: skip
    comparisons = (
        ("mixed", "rounding", "pages"), ("mixed", "rounding", "queries"),
        ("mixed", "text", "queries"), ("mixed-passages64", "text", "queries"),
        ("mixed", "mixed", "pages"),
    )  # fmt: skip
    for model in MODELS:
        parameters = read(f"metrics/scale/{model}.json")["parameters"]["total"]
        cells = (
            " / ".join(f"{r:.2f}" for r in study_ratios(*names, (3,), 4, (model,)))
            for names in comparisons
        )
        rows.append((f"`{model}`, {parameters / 1e6:.1f}M", *cells))
    return table(*rows)


@figure
def scale_passages() -> str:
    """Return what 32 passages more change, by study model."""
    rows: list[tuple[str, ...]] = [
        ("study model", "page loss, 4 bits", "3 bits", "query loss, 4 bits", "3 bits")
    ]
    for model in MODELS:
        parameters = read(f"metrics/scale/{model}.json")["parameters"]["total"]
        cells = (
            " / ".join(
                f"{_signed(round(100 * (r - 1)))} %"
                for r in study_ratios("mixed-passages32", "mixed", kind, (bits,), models=(model,))
            )
            for kind in ("pages", "queries")
            for bits in WIDTHS
        )
        rows.append((f"`{model}`, {parameters / 1e6:.1f}M", *cells))
    return table(*rows)


@figure
def gptq_losses() -> str:
    """Return rounding, GPTQ and AutoRound on the demo model, on one CPU."""
    rows: list[tuple[str, ...]] = [
        ("demo model, 5.8M", "page loss, 1e-6: 4 bits", "3 bits", "query loss, 1e-6: 4 bits",
         "3 bits")
    ]  # fmt: skip
    for contender, words in GPTQ_WAYS.items():
        cells = (
            _loss_cell(BESIDE, contender, bits, kind)
            for kind in ("pages", "queries")
            for bits in WIDTHS
        )
        rows.append((words, *cells))
    return table(*rows)


@figure
def gptq_pages() -> str:
    """Return the range of AutoRound's page loss over GPTQ's, both widths."""
    return _between(study_ratios("mixed", "gptq", "pages", models=(BESIDE,)))


@figure
def gptq_queries() -> str:
    """Return the same for queries."""
    return _between(study_ratios("mixed", "gptq", "queries", models=(BESIDE,)))


@figure
def gptq_rounding() -> str:
    """Return the range of GPTQ's page loss over rounding's, both widths."""
    return _between(study_ratios("gptq", "rounding", "pages", models=(BESIDE,)))


@figure
def gptq_time() -> str:
    """Return the seconds of the stage at 4 bits, GPTQ and AutoRound, on the same two CPU cores."""
    recipes = read(f"metrics/scale/{BESIDE}.json")["recipes"]
    seconds = (recipes[f"{name}-w4-seed1"]["quantize_seconds"] for name in ("gptq", "mixed"))
    return " and ".join(f"{value:.0f} s" for value in seconds)


@figure
def beyond_losses() -> str:
    """Return the losses with and without end-to-end tuning, of what was measured."""
    rows: list[tuple[str, ...]] = [
        ("study model", "made by", "page loss, 1e-6: 4 bits", "3 bits", "query loss, 1e-6: 4 bits",
         "3 bits")
    ]  # fmt: skip
    for model in BEYOND:
        for contender, words in BEYOND_WAYS.items():
            if cells := _losses(model, contender):
                rows.append((f"`{model.removeprefix('beyond-')}`", words, *cells))
    return table(*rows)


def _beyond(contender: str, other: str, kind: str) -> str:
    return _between(study_ratios(contender, other, kind, models=BEYOND))


@figure
def beyond_pages() -> str:
    """Return the range of the page loss of GPTQ tuned end to end over the default's."""
    return _beyond("gptq-e2e", "mixed", "pages")


@figure
def beyond_queries() -> str:
    """Return the same for queries."""
    return _beyond("gptq-e2e", "mixed", "queries")


@figure
def beyond_passages() -> str:
    """Return how 32 passages more change losses of GPTQ tuned end to end at 4 bits."""
    models = tuple(model for model in BEYOND if model != "beyond-150m")  # not measured there
    pages, queries = (
        _percent_between(study_ratios("gptq-passages32-e2e", "gptq-e2e", kind, (4,), models=models))
        for kind in ("pages", "queries")
    )
    return f"query loss {queries}, page loss {pages}"


@figure
def beyond_spread() -> str:
    """Return the most that the three seeds at 39m spread, of the mean, with 4 and 3 bits."""
    recipes = read("metrics/scale/beyond-39m.json")["recipes"].values()
    spreads = []
    for bits in WIDTHS:
        for page_set in PAGE_SETS:
            for kind in ("pages", "queries"):
                losses = [
                    recipe["loss"][page_set][kind]
                    for recipe in recipes
                    if (recipe["contender"], recipe["bits"]) == ("gptq-e2e", bits)
                ]
                spreads.append(statistics.stdev(losses) / statistics.mean(losses))
    return f"{100 * max(spreads):.1f} %"


@figure
def beyond_three_bits() -> str:
    """Return the losses of 3 bits tuned end to end, passages too, over those of 4 bits, by size."""
    rows: list[tuple[str, ...]] = [
        ("study model", "page loss of 4-bit rounding's", "query loss of 4-bit text-only tuning's")
    ]
    for model in BEYOND:
        measured = {
            recipe["contender"]
            for recipe in read(f"metrics/scale/{model}.json")["recipes"].values()
        }
        way = "gptq-passages32-e2e"
        if way not in measured:
            continue
        text = model if "text" in measured else model.removeprefix("beyond-")
        cells = (
            " / ".join(
                f"{study_loss(model, way, 3, name, kind) / study_loss(of, other, 4, name, kind):.2f}"
                for name in PAGE_SETS
            )
            for kind, of, other in (("pages", model, "rounding"), ("queries", text, "text"))
        )
        rows.append((f"`{model.removeprefix('beyond-')}`", *cells))
    return table(*rows)


def _tried(way: str, start: str) -> str:
    """Return the page losses of a trial of end-to-end tuning over those of where it started."""
    trials = read("metrics/scale/beyond-tried.json")
    return _between([trials[way][name][0] / trials[start][name][0] for name in PAGE_SETS])


@figure
def tried_scales() -> str:
    """Return the page loss of GPTQ with scales alone tuned end to end over GPTQ's."""
    return _tried("gptq, scales alone, 100 steps", "gptq")


@figure
def tried_norms() -> str:
    """Return the page loss of AutoRound with scales and norms tuned end to end over AutoRound's."""
    return _tried("autoround, scales and norms, 200 steps", "autoround")


@figure
def tried_no_norms() -> str:
    """Return the same with scales alone."""
    return _tried("autoround, scales alone, 200 steps", "autoround")


def _held_back(way: str) -> str:
    trials = read("metrics/scale/beyond-tried.json")
    pages, queries = trials[f"{way}, codes and scales, 200 steps, codes_lr 0.003"]["held_back"]
    return f"{pages:.2f} and {queries:.2f}"


@figure
def tried_gptq() -> str:
    """Return losses of pages and queries held back over those before, from GPTQ."""
    return _held_back("gptq")


@figure
def tried_autoround() -> str:
    """Return the same from AutoRound."""
    return _held_back("autoround")


@figure
def tried_max_sim() -> str:
    """Return losses of pages and queries held back over those before, with much weight on scores."""
    trials = read("metrics/scale/beyond-tried.json")
    pages, queries = trials["gptq, codes and scales, 200 steps, squared error of MaxSim x 20000"][
        "held_back"
    ]
    return f"{pages:.2f} and {queries:.2f}"


@figure
def tried_little_max_sim() -> str:
    """Return the same with little weight on scores."""
    trials = read("metrics/scale/beyond-tried.json")
    pages, queries = trials["gptq, codes and scales, 200 steps, squared error of MaxSim x 0.03"][
        "held_back"
    ]
    return f"{pages:.2f} and {queries:.2f}"


def _trial(name: str) -> tuple[list[float], list[float]]:
    """Return the losses of a trial, 1e-6: of pages on both page sets, and of queries."""
    trial = read("metrics/scale/beyond-tried.json")[name]
    pages, queries = zip(*(trial[page_set][:2] for page_set in PAGE_SETS), strict=True)
    return list(pages), list(queries)


def _trials(*rows: tuple[str, str]) -> str:
    """Return a table of trials by what they are called in it and their names in the file."""

    def cell(losses: list[float]) -> str:
        return " / ".join(f"{loss:,.4g}" if loss < 1000 else f"{loss:,.0f}" for loss in losses)

    body = [(words, *map(cell, _trial(name))) for words, name in rows]
    return table(("demo model", "page loss, 1e-6", "query loss, 1e-6"), *body)


def _trial_over(name: str, other: str) -> str:
    """Return a trial's losses over another's: ranges of both page sets, of pages and of queries."""
    ranges = (
        _between([one / two for one, two in zip(*pair, strict=True)])
        for pair in zip(_trial(name), _trial(other), strict=True)
    )
    return " and ".join(ranges)


KL = "gptq, codes and scales, 200 steps, queries drawn with their pages"


@figure
def tried_kl() -> str:
    """Return the losses with a KL of MaxSim scores, by its weight."""
    rows = (
        ("temperature 1, weight 0.3", "1 x 0.3"),
        ("1, weight 1", "1 x 1"),
        ("4, weight 1", "4 x 1"),
    )
    losses = (
        (words, *_trial(f"{KL}, KL of MaxSim scores at temperature {key}")) for words, key in rows
    )
    return "; ".join(
        f"{words}: {' / '.join(f'{loss:.0f}' for loss in pages)} and "
        f"{' / '.join(f'{loss:.0f}' for loss in queries)}"
        for words, pages, queries in losses
    )


@figure
def tried_alg_ext() -> str:
    """Return the losses of AutoRound with enable_alg_ext over those without, 3 and 2 bits."""
    return "; ".join(
        f"{bits} bits: "
        + _trial_over(
            f"autoround, {bits} bits, enable_alg_ext set up by hand", f"autoround, {bits} bits"
        )
        for bits in (3, 2)
    )


@figure
def tried_fisher() -> str:
    """Return the losses of GPTQ with weighted tokens over plain GPTQ's, 4 bits."""
    return _trial_over("gptq, tokens weighted by their gradients, 4 bits", "gptq")


@figure
def tried_rows() -> str:
    """Return the losses of GPTQ by the whole model, 128 rows at a time, over GPTQ's, 4 bits."""
    name = "gptq, two factors, no iteration, kinds alike, 128 rows at a time, 4 bits"
    return _trial_over(name, "gptq")


@figure
def tried_data() -> str:
    """Return the losses at 3 bits with more calibration data."""
    start, samples = (
        "gptq{}, codes and scales, {} steps, 3 bits, group {}, ",
        {
            "big": "192 pages and 383 queries drawn with another seed, {} passages",
            "varied": "384 pages and 767 queries, half of them of the training program, {} passages",
        },
    )
    rows = []
    names = {
        "big": "192 pages, 383 queries",
        "varied": "384 pages, 767 queries, half of other kinds",
    }
    for way, kind, passages, group, steps in (
        ("", "big", 0, 128, 200), ("", "big", 32, 128, 200), ("", "big", 128, 128, 200),
        ("", "varied", 128, 128, 200), ("", "varied", 128, 128, 600),
        ("", "varied", 128, 64, 200), (" by the whole model", "varied", 128, 64, 200),
        (" by the whole model", "varied", 128, 64, 600),
    ):  # fmt: skip
        words = f"{names[kind]}, {passages} passages; group {group}, {steps} steps{way}"
        rows.append((words, (start + samples[kind]).format(way, steps, group, passages)))
    return _trials(*rows)


@figure
def tried_data_target() -> str:
    """Return the page loss of rounding and the query loss of text-only tuning at 4 bits."""
    pages, queries = (
        " / ".join(f"{1e6 * study_loss('demo', way, 4, name, kind):,.0f}" for name in PAGE_SETS)
        for way, kind in (("rounding", "pages"), ("text", "queries"))
    )
    return f"{pages} of pages and {queries} of queries"


HESSIAN = "hessian-demo"
HESSIAN_WAYS = {
    "gptq-model": "GPTQ by the whole model",
    "gptq-model-e2e": "the same, then 200 steps end to end",
    "gptq-model-passages32-e2e": "the same with 32 passages more",
}


@figure
def hessian_losses() -> str:
    """Return the losses of GPTQ by the whole model beside others'; metrics/scale/hessian-demo.json."""
    rows: list[tuple[str, ...]] = [
        ("demo model, 5.8M", "page loss, 1e-6: 4 bits", "3 bits", "query loss, 1e-6: 4 bits", "3 bits")
    ]  # fmt: skip
    ways = [("beyond-demo", name) for name in ("mixed", "gptq", "gptq-e2e", "gptq-passages32-e2e")]
    ways += [(HESSIAN, name) for name in HESSIAN_WAYS]
    names = {**BEYOND_WAYS, **HESSIAN_WAYS, "gptq-passages32-e2e": "the same, 32 passages more"}
    for model, contender in ways:
        if cells := _losses(model, contender):
            rows.append((names[contender].replace("**", ""), *cells))
    return table(*rows)


def _hessian(contender: str, other: str, kind: str, bits: tuple[int, ...] = WIDTHS) -> str:
    return _between(
        [
            study_loss(HESSIAN, contender, width, page_set, kind)
            / study_loss("beyond-demo", other, width, page_set, kind)
            for width in bits
            for page_set in PAGE_SETS
        ]
    )


@figure
def hessian_gptq() -> str:
    """Return the losses of GPTQ by the whole model over those of GPTQ by layers."""
    return (
        f"{_hessian('gptq-model', 'gptq', 'pages')} times GPTQ's page loss and "
        f"{_hessian('gptq-model', 'gptq', 'queries')} times its query loss"
    )


@figure
def hessian_tuned() -> str:
    """Return the same for both tuned end to end."""
    return (
        f"{_hessian('gptq-model-e2e', 'gptq-e2e', 'pages')} times the page loss and "
        f"{_hessian('gptq-model-e2e', 'gptq-e2e', 'queries')} times the query loss"
    )


@figure
def hessian_time() -> str:
    """Return the seconds of the stage by the whole model at 4 bits, on two CPU cores in use."""
    recipe = read(f"metrics/scale/{HESSIAN}.json")["recipes"]["gptq-model-w4-seed1"]
    return f"{recipe['quantize_seconds']:.0f} s"


@figure
def hessian_three_bits() -> str:
    """Return the query loss at 3 bits, tuned end to end, over that of 4-bit text-only tuning."""
    return _between(
        [
            study_loss(HESSIAN, "gptq-model-passages32-e2e", 3, page_set, "queries")
            / study_loss("demo", "text", 4, page_set, "queries")
            for page_set in PAGE_SETS
        ]
    )


HESSIAN_MODELS = {
    "demo": (HESSIAN, "beyond-demo", "demo"),
    "39m": ("hessian-39m",),
    "150m": ("hessian-150m",),
}
"""Models on which GPTQ by the whole model was measured -> files with figures of these very models."""
BASELINES = {"39m again": ("hessian-39m-2",), "150m again": ("hessian-150m-2",)}
"""Models trained once more, on which rounding and text-only tuning were measured beside it."""
BY_MODEL, BY_MODEL_PASSAGES = "gptq-model-e2e", "gptq-model-passages32-e2e"
HESSIAN_SCALE_WAYS = {
    "text": "AutoRound, 16 passages",
    "mixed": "AutoRound: the default",
    "gptq-passages32-e2e": "GPTQ by layers, 32 passages more, end to end",
    BY_MODEL: "GPTQ by the whole model, end to end",
    BY_MODEL_PASSAGES: "the same with 32 passages more",
}


def _hessian_file(model: str, contender: str) -> str | None:
    """Return the name of the file with a contender's losses on a model, None if it was not measured."""
    for name in {**HESSIAN_MODELS, **BASELINES}[model]:
        recipes = read(f"metrics/scale/{name}.json")["recipes"].values()
        if any(recipe["contender"] == contender for recipe in recipes):
            return name
    return None


def _hessian_losses(model: str, contender: str, bits: int, kind: str) -> list[float]:
    """Return the losses of a contender on both page sets."""
    name = _hessian_file(model, contender)
    assert name is not None, f"{contender} was not measured on {model}"
    return [study_loss(name, contender, bits, page_set, kind) for page_set in PAGE_SETS]


def _hessian_over(
    model: str, contender: str, bits: int, kind: str, other: str = "mixed", other_bits: int = 4
) -> list[float]:
    """Return them over those of another contender on the same model."""
    losses = _hessian_losses(model, contender, bits, kind)
    others = _hessian_losses(model, other, other_bits, kind)
    return [one / two for one, two in zip(losses, others, strict=True)]


def _pair(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _round_pair(values: list[float]) -> str:
    """Return both as one number if they are the same to two digits."""
    return " to ".join(sorted({f"{value:.2f}" for value in values}))


def _millionths(losses: list[float]) -> str:
    from demo.studies.scale.summary import UNIT, significant

    return " / ".join(significant(loss / UNIT) for loss in losses)


@figure
def hessian_models() -> str:
    """Return training and search of the larger models of GPTQ by the whole model."""
    return _trained(("hessian-39m", "hessian-150m"))


def _trained(names: Iterable[str]) -> str:
    said = []
    for name in names:
        values = read(f"metrics/scale/{name}.json")
        training = values["training"]
        found = " / ".join(f"{values['page_sets'][one]['ndcg_at_5']:.3f}" for one in PAGE_SETS)
        said.append(
            f"`{values['shape']}` for {training['wall_seconds']} s ({training['steps']:,} steps), "
            f"nDCG@5 {found}"
        )
    return "; ".join(said)


@figure
def hessian_scale() -> str:
    """Return the losses of GPTQ by the whole model by study model, beside the default's."""
    rows: list[tuple[str, ...]] = [
        ("study model", "bits", "made by", "page loss, 1e-6", "of the default's", "query loss, 1e-6",
         "of the default's", "of 4-bit text-only tuning's")
    ]  # fmt: skip
    for model in HESSIAN_MODELS:
        for bits in WIDTHS:
            for contender, words in HESSIAN_SCALE_WAYS.items():
                if _hessian_file(model, contender) is None:
                    continue
                cells = [
                    cell
                    for kind in ("pages", "queries")
                    for cell in (
                        _millionths(_hessian_losses(model, contender, bits, kind)),
                        "" if contender == "mixed"
                        else _pair(_hessian_over(model, contender, bits, kind, other_bits=bits)),
                    )
                ]  # fmt: skip
                itself = (contender, bits) == ("text", 4) or _hessian_file(model, "text") is None
                text = "" if itself else _pair(
                    _hessian_over(model, contender, bits, "queries", "text")
                )  # fmt: skip
                rows.append((f"`{model}`", str(bits), words, *cells, text))
    return table(*rows)


def _hessian_default(model: str, contender: str, bits: int) -> str:
    pages, queries = (
        _round_pair(_hessian_over(model, contender, bits, kind, other_bits=bits))
        for kind in ("pages", "queries")
    )
    return f"{pages} times the default's page loss and {queries} times its query loss"


@figure
def hessian_39m() -> str:
    """Return the losses by the whole model with passages at 39m over the default's, 4 bits."""
    return _hessian_default("39m", BY_MODEL_PASSAGES, 4)


@figure
def hessian_150m() -> str:
    """Return the losses by the whole model at 150m over the default's, 4 bits, without passages."""
    return _hessian_default("150m", BY_MODEL, 4)


@figure
def hessian_39m_three_bits() -> str:
    """Return the query loss at 39m, 3 bits with passages, over that of text-only tuning at 4."""
    return _pair(_hessian_over("39m", BY_MODEL_PASSAGES, 3, "queries", "text"))


@figure
def hessian_39m_three_bits_pages() -> str:
    """Return the page loss of the same, and over the default's at 4 bits."""
    losses = " / ".join(
        f"{loss:.6f}" for loss in _hessian_losses("39m", BY_MODEL_PASSAGES, 3, "pages")
    )
    ratios = " / ".join(
        f"{ratio:.1f}" for ratio in _hessian_over("39m", BY_MODEL_PASSAGES, 3, "pages")
    )
    return f"{losses}, {ratios} times the default's at 4 bits"


@figure
def hessian_150m_three_bits() -> str:
    """Return the losses at 150m and 3 bits by the whole model, and by layers with passages."""
    pages, queries = (
        " against ".join(
            " / ".join(f"{loss:.6f}" for loss in _hessian_losses("150m", contender, 3, kind))
            for contender in (BY_MODEL, "gptq-passages32-e2e")
        )
        for kind in ("pages", "queries")
    )
    return f"pages {pages}, queries {queries}"


BASELINE_WAYS = {
    "mixed": "AutoRound: the default",
    "gptq-passages32-e2e": "GPTQ by layers, 32 passages more, end to end",
    "gptq-model": "GPTQ by the whole model",
    BY_MODEL: "the same, end to end",
    BY_MODEL_PASSAGES: "the same with 32 passages more",
}


def _of_baseline(model: str, contender: str, bits: int, kind: str, other_bits: int) -> list[float]:
    """Return losses over those of rounding, of queries over text-only tuning's, on the same model."""
    other = {"pages": "rounding", "queries": "text"}[kind]
    return _hessian_over(model, contender, bits, kind, other, other_bits)


@figure
def hessian_baselines() -> str:
    """Return losses over those of rounding and of text-only tuning, on models trained once more."""
    rows: list[tuple[str, ...]] = [
        ("study model", "bits", "made by", "page loss, 1e-6", "of rounding's", "of 4-bit rounding's",
         "query loss, 1e-6", "of text-only tuning's", "of 4-bit text-only tuning's")
    ]  # fmt: skip
    for model in BASELINES:
        for bits in WIDTHS:
            for contender, words in BASELINE_WAYS.items():
                if _hessian_file(model, contender) is None:
                    continue
                cells = []
                for kind in ("pages", "queries"):
                    losses = _hessian_losses(model, contender, bits, kind)
                    of_same = _pair(_of_baseline(model, contender, bits, kind, bits))
                    of_four = _pair(_of_baseline(model, contender, bits, kind, 4))
                    cells += [_millionths(losses), of_same, "" if bits == 4 else of_four]
                rows.append((f"`{model.removesuffix(' again')}`", str(bits), words, *cells))
    return table(*rows)


@figure
def hessian_targets() -> str:
    """Return the worst ratios of the default and of GPTQ by the whole model, all sets and widths."""
    said = []
    for contender, words in (("mixed", "the default"), ("gptq-model", "GPTQ by the whole model")):
        pages, queries = (
            max(
                ratio
                for model in BASELINES
                for bits in WIDTHS
                for ratio in _of_baseline(model, contender, bits, kind, bits)
            )
            for kind in ("pages", "queries")
        )
        said.append(f"{words} at most {pages:.2f} and {queries:.2f} times")
    return ", ".join(said)


@figure
def hessian_150m_queries() -> str:
    """Return the query loss of GPTQ by the whole model at 150m, 3 bits, over 4-bit text-only tuning's."""
    return _pair(_of_baseline("150m again", "gptq-model", 3, "queries", 4))


@figure
def hessian_second_models() -> str:
    """Return training and search of these models."""
    return _trained(name for (name,) in BASELINES.values())


@figure
def hessian_150m_by_layers() -> str:
    """Return page losses over the default's at 3 bits: of the 150m here, of another by layers."""
    here = _round_pair(_hessian_over("150m", BY_MODEL, 3, "pages", other_bits=3))
    other = study_ratios("gptq-e2e", "mixed", "pages", (3,), models=("beyond-150m",))
    return f"{here} times the default's page loss here, {_round_pair(other)} times there"


@figure
def small_by_model() -> str:
    """Return the losses of the recipe small with hessian: model over those without."""
    trial = read("metrics/scale/small-demo.json")
    pages, queries = (
        _between([trial["model"][name][kind] / trial["layer"][name][kind] for name in PAGE_SETS])
        for kind in ("pages", "queries")
    )
    return f"{pages} times the page loss and {queries} times the query loss"


@figure
def small_by_model_time() -> str:
    """Return the seconds of the stage for both, two runs each."""
    trial = read("metrics/scale/small-demo.json")
    model, layer = (
        " and ".join(f"{seconds:.0f}" for seconds in sorted(trial[way]["quantize_seconds"]))
        for way in ("model", "layer")
    )
    return f"{model} s instead of {layer}"


@figure
def tried_reach() -> str:
    """Return the share of GPTQ's codes that are more than one step from their weight."""
    trials = read("metrics/scale/beyond-tried.json")
    shares = trials["share of gptq's codes more than one step from their weight"]
    return " and ".join(f"{100 * shares[str(bits)]:.1f} %" for bits in WIDTHS)


@figure
def scale_pages() -> str:
    """Return the range of the default's page loss over rounding's, 4 bits."""
    return _between(study_ratios("mixed", "rounding", "pages", (4,)))


@figure
def scale_pages_3() -> str:
    """Return the same at 3 bits."""
    return _between(study_ratios("mixed", "rounding", "pages", (3,)))


@figure
def scale_text_pages() -> str:
    """Return the range of the page loss of 16 passages over rounding's, both widths."""
    return _between(study_ratios("text", "rounding", "pages"))


@figure
def scale_queries() -> str:
    """Return the range of the default's query loss over that of 16 passages, both widths."""
    return _between(study_ratios("mixed", "text", "queries"))


@figure
def scale_passages_queries() -> str:
    """Return what 32 passages more change in the query loss, both widths."""
    return _percent_between(study_ratios("mixed-passages32", "mixed", "queries"))


@figure
def scale_passages_pages() -> str:
    """Return what 32 passages more change in the page loss at 4 bits."""
    return _percent_between(study_ratios("mixed-passages32", "mixed", "pages", (4,)))


@figure
def scale_passages_pages_3() -> str:
    """Return the same at 3 bits."""
    return _percent_between(study_ratios("mixed-passages32", "mixed", "pages", (3,)))


@figure
def scale_naive() -> str:
    """Return the range of the page loss without deepstack over the default's, but for the demo."""
    models = tuple(model for model in MODELS if model != "demo")
    return _between(study_ratios("naive", "mixed", "pages", models=models), 1)


@figure
def scale_naive_demo() -> str:
    """Return the same of the demo model."""
    return _between(study_ratios("naive", "mixed", "pages", models=("demo",)), 1)


@figure
def naive_harm() -> str:
    """Return the page loss without deepstack over that on true inputs, by study model."""
    rows: list[tuple[str, ...]] = [("parameters", "4 bits", "3 bits")]
    for model in MODELS:
        parameters = read(f"metrics/scale/{model}.json")["parameters"]["total"]
        cells = (
            ", ".join(
                f"{r:.1f}"
                for r in study_ratios("naive", "mixed", "pages", (bits,), models=(model,))
            )
            for bits in WIDTHS
        )
        rows.append((f"{parameters / 1e6:.1f}M", *cells))
    return table(*rows)


@figure
def scale_three_bits_pages() -> str:
    """Return the range of the 3-bit default's page loss over that of 4-bit rounding."""
    return _between(study_ratios("mixed", "rounding", "pages", (3,), 4))


@figure
def scale_three_bits_queries() -> str:
    """Return the range of the 3-bit default's query loss over that of 16 passages at 4 bits."""
    return _between(study_ratios("mixed", "text", "queries", (3,), 4))


def _spread(kind: str) -> str:
    """Return the standard deviation over the seeds of `39m`, in percent of the mean."""
    from statistics import fmean, stdev

    shares = []
    for contender in ("mixed", "mixed-passages32"):
        for bits in WIDTHS:
            for page_set in PAGE_SETS:
                losses = [
                    recipe["loss"][page_set][kind]
                    for recipe in read("metrics/scale/39m.json")["recipes"].values()
                    if (recipe["contender"], recipe["bits"]) == (contender, bits)
                ]
                shares.append(100 * stdev(losses) / fmean(losses))
    return f"{_between(shares, 1)} %"


@figure
def scale_spread_pages() -> str:
    """Return the seeds' spread of page losses."""
    return _spread("pages")


@figure
def scale_spread_queries() -> str:
    """Return the seeds' spread of query losses."""
    return _spread("queries")


# ---- true size, random weights -------------------------------------------------------------------
@figure
def size_4b_small() -> str:
    """Return the bytes at true size with 8-bit token embeddings and vision tower."""
    return gb(cpu("rtn-8")["files_bytes"], 2)


@figure
def size_4b() -> str:
    """Return the bytes of the 4B checkpoint, original and 4-bit."""
    floor = gpu("floor")
    return f"{gb(floor['read_bytes'], 2)} → {gb(floor['written_bytes'], 2)}"


@figure
def parameters_4b() -> str:
    """Return the number of parameters of the 4B model."""
    return f"{cpu('inspect')['parameters']:,}"


@figure
def true_size() -> str:
    """Return time and memory at true size."""
    peak = gpu("rates")["bf16_flops"]
    per_page = _floor_seconds_per_page()

    def tuning(step: str) -> tuple[str, ...]:
        run = gpu(step)
        return (
            "one H100", f"{run['seconds']:.0f} s",
            f"GPU {gb(run['gpu_peak_bytes'])} ({gb(run['gpu_peak_reserved_bytes'])} reserved), RAM "
            f"{gb(run['peak_own_bytes'])} own, {gb(run['peak_resident_bytes'])} with mapped pages",
        )  # fmt: skip

    def embedding(step: str) -> tuple[str, ...]:
        budgets = gpu(step)["budgets"]
        rates = ", ".join(f"{budget['pages_per_second']:.1f}" for budget in budgets)
        tokens = ", ".join(f"{budget['visual_tokens_per_batch']:,}" for budget in budgets)
        memory = ", ".join(f"{budget['gpu_peak_bytes'] / 1e9:.1f}" for budget in budgets)
        return (
            "one H100", f"{rates} pages/s at budgets of {tokens} visual tokens", f"GPU {memory} GB"
        )  # fmt: skip

    set_ = gpu("tune-200")["calibration"]
    samples = f"{set_['pages']} pages of 1,271 tokens + {set_['queries']} queries"
    low, layer = gpu("tune-20-low"), cpu("tune-block")
    inspected, rtn, library = cpu("inspect"), cpu("rtn"), cpu("rtn-library")
    bare, dense = cpu("floor"), cpu("embed-w4")
    return table(
        ("what", "machine", "time", "peak memory"),
        (f"AutoRound, 200 iterations, {samples}, 8 samples a step", *tuning("tune-200")),
        ("the same, 50 iterations", *tuning("tune-50")),
        ("the same, 0 iterations (AutoRound's data-aware rounding)", *tuning("tune-0")),
        (f"one sample at a time (`batch_size: 1`), {low['iters']} iterations, a model of "
         f"{low['layers']} such layers", *tuning("tune-20-low")),
        (f"floor: the operations of 200 iterations at {peak / 1e12:.0f} bf16 TFLOP/s", "one H100",
         f"{gpu('tune-200')['operations'] / peak:.0f} s", ""),
        ("embedding pages of 1,271 tokens, original, capped at 12 GB of GPU memory",
         *embedding("embed-12gb")),
        ("the same, 4-bit checkpoint, dequantized", *embedding("embed-w4")),
        ("floor: a page's operations at that rate", "one H100", f"{1 / per_page:.0f} pages/s", ""),
        (f"`inspect`: headers only, {inspected['linears']} linears", "2 CPU cores",
         f"{inspected['seconds']:.1f} s, start of Python included",
         f"{inspected['peak_resident_bytes'] / 1e6:.0f} MB"),
        ("rounding to nearest (`rtn`) through the stage", "2 CPU cores",
         f"{rtn['seconds']:.0f} s (AutoRound's own model-free path {library['seconds']:.0f} s; "
         f"reading and writing the bytes alone {bare['read_seconds'] + bare['write_seconds']:.0f} s)",
         f"{gb(rtn['peak_own_bytes'], 2)} own, {gb(rtn['peak_resident_bytes'])} with mapped pages"),
        (f"AutoRound, first of 36 layers, {layer['iters']} iterations, 2 pages + 2 queries",
         "2 CPU cores",
         f"{layer['layer_seconds']:.0f} s a layer; 200 iterations of 8 samples would take "
         f"{layer['projected_hours_200_iters']:.0f} hours (projected)",
         f"{gb(layer['peak_own_bytes'])} own"),
        ("loading the 4-bit checkpoint with dense bfloat16 weights", "2 CPU cores",
         f"{dense['load_seconds']:.0f} s", f"{gb(dense['peak_own_bytes'])} own"),
    )  # fmt: skip


def _floor_seconds_per_page() -> float:
    """Return the least time of a page: measured time over the committed ratio to the floor."""
    ratios = read("metrics/size/cuda.json")["ratios"]
    budget = gpu("embed-12gb")["budgets"][0]
    tokens = budget["visual_tokens_per_batch"]
    ratio = ratios[f"embed-12gb ({tokens} visual tokens a batch) / its operations at peak"]
    return float(budget["seconds"] / budget["pages"] / ratio)


@figure
def rtn_equal() -> str:
    """Return how many tensors of the rounded checkpoint equal AutoRound's."""
    values = cpu("rtn-equal")
    if values["equal"] != values["tensors"]:
        raise ValueError("metrics/size/cpu.json: rtn-equal: not all tensors are equal")
    return f"{values['tensors']:,}"


@figure
def benchmark_memory() -> str:
    """Return the GPU memory that original and quantized take when timed in one process."""
    return gb(served("speed")["gpu_peak_reserved_bytes"], 0)


@figure
def bytes_off() -> str:
    """Return by how much `inspect` misses the bytes of the file."""
    return f"{100 * gpu('rtn')['bytes_off']:.4f} %"


@figure
def page_preparation() -> str:
    """Return the CPU time that the preparation of a page takes."""
    times = sorted(gpu(step)["page_preparation_seconds"] for step in ("embed-12gb", "embed-w4"))
    return f"{times[0]:.2f} to {times[1]:.2f} s"


# ---- serving -------------------------------------------------------------------------------------
def _operations() -> dict[str, float]:
    """Return the operations of the decoder's linears a token, and of a whole page of 1,271 tokens."""
    inputs_outputs = (2560 * 6144, 4096 * 2560, 2560 * 19456, 9728 * 2560)
    return {"token": 2 * 36 * sum(inputs_outputs)}


def _batch_name(kind: str, count: int) -> str:
    """Return what a row says of a batch of queries or pages."""
    several = {"query": "queries", "page": "pages"}
    return f"{count} {several[kind] if count > 1 else kind}"


@figure
def serving_speed() -> str:
    """Return the speed of the runtime, original against 4-bit, with activations of 16 bits and int8."""
    speed, rates = served("speed"), gpu("rates")
    weights = _operations()["token"] // 2  # of the decoder's linears
    rows: list[tuple[str, ...]] = [
        ("", "original", "4-bit", "ratio", "4-bit, int8 activations", "ratio",
         "original, int8 activations", "floor with 16-bit activations: original / 4-bit")
    ]  # fmt: skip

    def floors(kind: str, count: int) -> str:
        if kind == "page":
            floor = count * _floor_seconds_per_page() * 1e3
            return f"{floor:.0f} ms"
        work = count * speed["query"]["tokens"] * _operations()["token"] / rates["bf16_flops"]
        reading = [weights * size / rates["memory_bytes_per_second"] for size in (2, 0.5)]
        floor_ms = [1e3 * max(work, one) for one in reading]
        return " / ".join(dict.fromkeys(f"{one:.1f} ms" for one in floor_ms))

    for kind in ("query", "page"):
        for count in sorted(map(int, speed[kind]["batches"])):
            best = speed[kind]["batches"][str(count)]["best"]
            tokens = f" of {speed[kind]['tokens']:,} tokens" if count == 1 else ""
            rows.append(
                (
                    f"{_batch_name(kind, count)}{tokens}",
                    f"{best['original_ms']:.1f} ms",
                    f"{best['quantized_ms']:.1f} ms", f"**{times(best['speedup'])}**",
                    f"{best['quantized_int8_ms']:.1f} ms", f"**{times(best['speedup_int8'])}**",
                    f"{best['original_int8_ms']:.1f} ms", floors(kind, count),
                )
            )  # fmt: skip
    files = gpu("floor")
    rows.append(
        ("all weights, as files", gb(files["read_bytes"], 2), gb(files["written_bytes"], 2),
         times(files['written_bytes'] / files['read_bytes']), "", "", "", "")
    )  # fmt: skip
    alone = {which: values["memory"] for which, values in speed["alone"].items()}
    for name, key in (
        ("GPU memory, loaded", "gpu_loaded_bytes"),
        ("peak; query batches of 1, 8 and 64 and a page recorded", "gpu_peak_reserved_bytes"),
    ):
        original = alone["original"][key]
        cells = [
            cell
            for which in ("quantized", "quantized_int8")
            for cell in (gb(alone[which][key], 2), times(alone[which][key] / original))
        ]
        rows.append((name, gb(original, 2), *cells, "", ""))
    return table(*rows)


@figure
def serving_sustained() -> str:
    """Return the runtime's times and ratios under a steady load."""
    rows: list[tuple[str, ...]] = [
        ("", "original", "4-bit", "ratio", "4-bit, int8 activations", "ratio")
    ]
    for kind in ("query", "page"):
        batches = served("speed")[kind]["batches"]
        for count in sorted(map(int, batches)):
            taken = batches[str(count)]["sustained"]
            rows.append(
                (
                    _batch_name(kind, count),
                    f"{taken['original_ms']:.1f} ms",
                    f"{taken['quantized_ms']:.1f} ms", times(taken["speedup"]),
                    f"{taken['quantized_int8_ms']:.1f} ms", times(taken["speedup_int8"]),
                )
            )  # fmt: skip
    return table(*rows)


def _early_trial(queries: str, *variants: str) -> list[str]:
    """Return milliseconds of a decoder with several variants; early-kernels-h100.json."""
    trial = read("metrics/size/early-kernels-h100.json")["sizes"][queries]
    return [f"{trial[variant][0]:.2f}" for variant in variants]


@figure
def early_1() -> str:
    """Return a decoder's time for a query with kernels of torch.compile, and with early ones."""
    return " to ".join(_early_trial("1", "now", "gate2048w8")) + " ms"


@figure
def early_8() -> str:
    """Return the same for 8 queries."""
    return " to ".join(_early_trial("8", "now", "gate2048w8")) + " ms"


@figure
def early_8_original() -> str:
    """Return the same for 8 queries and the original."""
    return " to ".join(_early_trial("8", "bf16", "bf16 own")) + " ms"


@figure
def early_streams() -> str:
    """Return the time of 8 queries in one part, and the least of it in two, in a trial."""
    trial = read("metrics/size/early-kernels-h100.json")["streams"]["8"]
    parts = min(single for name, (single, _) in trial.items() if name.startswith("2 "))
    return f"{parts:.1f} ms where {trial['now'][0]:.1f}"


@figure
def early_fetched() -> str:
    """Return the least time of 8 queries with weights fetched early, and without, in a trial."""
    trial = read("metrics/size/early-kernels-h100.json")["early"]["8"]
    fetched = min(trial[f"early{steps} own"][0] for steps in (4, 16, 64))
    return f"{fetched:.2f} ms where {trial['now own'][0]:.2f}"


@figure
def early_issued() -> str:
    """Return the time of 64 queries, wide tiles' products issued later and first, in a trial."""
    trial = read("metrics/size/early-kernels-h100.json")["sizes"]["64"]
    single, steady = (f"{trial['own'][i]:.1f} to {trial['siw'][i]:.1f} ms" for i in (0, 1))
    return f"{single} in turns, {steady} under a steady load"


@figure
def rates() -> str:
    """Return the measured rates of the card."""
    measured = gpu("rates")
    memory, arithmetic = measured["memory_bytes_per_second"], measured["bf16_flops"]
    return f"{memory / 1e12:.2f} TB/s and {arithmetic / 1e12:.0f} bfloat16 TFLOP/s"


@figure
def parity_4_bit() -> str:
    """Return the minimum cosine of the 4-bit runtime with transformers, on a page and on queries."""
    cosine = served("speed")["alone"]["quantized"]["cosine"]
    return f"{cosine['page']:.4f} on a page and {cosine['query']:.4f} on queries"


@figure
def compiled_query() -> str:
    """Return the time of a query without graphs."""
    modes = served("speed")["query"]["batches"]["1"]["compiled"]
    return f"{modes['original_ms']:.0f} and {modes['quantized_ms']:.0f} ms"


@figure
def compiled_page() -> str:
    """Return the time of a page without graphs."""
    modes = served("speed")["page"]["batches"]["1"]["compiled"]
    return f"{modes['original_ms']:.0f} and {modes['quantized_ms']:.0f} ms"


@figure
def page_rates() -> str:
    """Return the arithmetic that a layer's linears reach on a page in 16 and 4 bits, and the peak."""
    shapes = read("metrics/size/kernels-cuda.json")["shapes"].values()
    operations = 2 * 1291 * sum(shape["inputs"] * shape["outputs"] for shape in shapes)
    rates = (
        operations / sum(shape["kernels"][kernel]["1291"]["us"] for shape in shapes) / 1e6
        for kernel in ("dense bfloat16", "humming")
    )
    peak = gpu("rates")["bf16_flops"] / 1e12
    return " and ".join(f"{rate:.0f}" for rate in rates) + f" of {peak:.0f}"


@figure
def repeatability() -> str:
    """Return how runs of 4-bit weights differ, and times, by default and deterministic."""
    batches = read("metrics/size/repeatability-cuda.json")["batches"]
    rows: list[tuple[str, ...]] = [
        (
            "batch",
            "numbers that differ",
            "largest 1 - cosine of a token",
            "time",
            "deterministic: numbers that differ",
            "time",
        )
    ]
    for name in sorted(
        batches, key=lambda name: (not name.endswith("queries"), int(name.split()[0]))
    ):
        usual, same = batches[name]["default"], batches[name]["deterministic"]
        if same["differing"]:
            raise ValueError("runs differ that should not; say so in docs/benchmarks.md")
        rows.append(
            (
                name.replace("1 queries", "1 query").replace("1 pages", "1 page"),
                f"{usual['differing'] / usual['numbers']:.0%}",
                f"{usual['largest_1_minus_cosine']:.5f}" if usual["differing"] else "",
                f"{usual['ms']:.1f} ms",
                "0%",
                f"{same['ms']:.1f} ms",
            )
        )
    return table(*rows)


def by_tokens(
    counts: Iterable[str], rows: Mapping[str, Callable[[str], float]], digits: int = 0
) -> str:
    """Return a table of microseconds: title of a row -> what gives them for a number of tokens."""
    sizes = sorted(counts, key=int)
    head = ("tokens", *(f"{int(count):,}" for count in sizes))
    return table(
        head,
        *((title, *(f"{taken(n):,.{digits}f}" for n in sizes)) for title, taken in rows.items()),
    )


def kinds_by_tokens(
    times: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str], digits: int = 0
) -> str:
    """Return a table of microseconds: title of a row -> its kind among those of a number of tokens."""

    def of(kind: str) -> Callable[[str], float]:
        return lambda count: times[count][kind]

    return by_tokens(times, {title: of(kind) for title, kind in kinds.items()}, digits)


@figure
def gate_gpu() -> str:
    """Return microseconds of gate and up with the gate after or within their product."""
    kinds = {
        "bfloat16, then the gate": "bfloat16",
        "4-bit product alone": "product",
        "4-bit product, then the gate": "after",
        "4-bit product with the gate": "within",
    }
    return kinds_by_tokens(read("metrics/size/gate-h100.json")["tokens"], kinds)


@figure
def gate_few() -> str:
    """Return microseconds of gate, up and down for few tokens, the gate after or within its product."""
    kinds = {
        "without the gate": "none",
        "the gate after the product": "after",
        "within, parts add up in one place": "within",
        "within, each part has a place": "slots",
    }
    return kinds_by_tokens(read("metrics/size/gate-few-h100.json")["chain"], kinds, digits=1)


@figure
def wide_few() -> str:
    """Return microseconds of gate and up with one wide tile of all tokens."""
    kinds = {
        "bfloat16": "bfloat16",
        "two tiles of half the tokens": "before",
        "a wide one of all": "wide",
    }
    return kinds_by_tokens(read("metrics/size/gate-few-h100.json")["wide"], kinds, digits=1)


@figure
def tiles_large() -> str:
    """Return microseconds of the other three linears with humming's own tiles and the tiles used."""
    products = read("metrics/size/tiles-large-h100.json")["products"]
    sizes = {"qkv": (2560, 6144), "o": (4096, 2560), "down": (9728, 2560)}

    def time_of(name: str, count: str, kind: str) -> float:
        product = products[name][count]
        if kind != "used":
            return float(product[kind])
        ranges = replace_tiles([Range(0, 1 << 30, {})], Product(*sizes[name], PROCESSORS))
        (tile,) = (r.options for r in ranges if r.beyond < int(count) <= r.up_to)
        split = "s" if tile["use_stream_k"] else ""
        return float(product["tiles"][f"{tile['block_shape'][0]}{split}"])

    def sums(kind: str) -> Callable[[str], float]:
        return lambda count: sum(time_of(name, count, kind) for name in sizes)

    rows = {
        "bfloat16": sums("bfloat16"),
        "humming, its own tiles": sums("own"),
        "humming, the tiles used": sums("used"),
    }
    return by_tokens([count for count in products["o"] if int(count) > LARGE_FROM], rows)


@figure
def speedup_1_query() -> str:
    """Return 4-bit's speed-up for one query."""
    return times(served("speed")["query"]["batches"]["1"]["best"]["speedup"])


@figure
def speedup_64_queries() -> str:
    """Return 4-bit's speed-up for 64 queries."""
    return times(served("speed")["query"]["batches"]["64"]["best"]["speedup"])


@figure
def speedup_64_queries_int8() -> str:
    """Return the same with 8-bit activations."""
    return times(served("speed")["query"]["batches"]["64"]["best"]["speedup_int8"])


@figure
def speedup_1_page() -> str:
    """Return 4-bit's speed-up for one page."""
    return times(served("speed")["page"]["batches"]["1"]["best"]["speedup"])


@figure
def kernels_gpu() -> str:
    """Return microseconds of the four merged linears of one decoder layer, by kernel and tokens."""
    shapes = read("metrics/size/kernels-cuda.json")["shapes"].values()
    rates = gpu("rates")
    tokens = sorted(map(int, next(iter(shapes))["kernels"]["dense bfloat16"]))
    names = {
        "dense bfloat16": "bfloat16",
        "humming": "humming (used)",
        "humming, its own tiles": "humming, its own tiles",
        "int8 activations": "int8 activations (used, where faster)",
        "auto-round tritonv2": "auto-round's Triton kernel (`tritonv2`)",
        "torch int4": "torch's int4 (tinygemm)",
        "auto-round torch": "auto-round's plain torch",
    }
    rows = [("tokens", *(f"{count:,}" for count in tokens))]
    for key, name in names.items():
        if all(key in shape["kernels"] for shape in shapes):
            sums = (
                sum(shape["kernels"][key][str(count)]["us"] for shape in shapes) for count in tokens
            )
            rows.append((name, *(f"{total:,.0f}" for total in sums)))
    size = sum(shape["inputs"] * shape["outputs"] for shape in shapes)
    reading = [1e6 * size * width / rates["memory_bytes_per_second"] for width in (2, 0.5)]
    floors = (
        f"{reading[0]:.0f} / {reading[1]:.0f} / {1e6 * 2 * size * count / rates['bf16_flops']:,.0f}"
        for count in tokens
    )
    rows.append(("floor: bytes of bfloat16 / of 4 bits / operations", *floors))
    return table(*rows)


def _tiles(tokens: str, kind: str) -> float:
    """Return microseconds of the four merged linears of a layer; tiles-h100.json."""
    linears = read("metrics/size/tiles-h100.json")["tokens"][tokens]
    return sum(float(linear[kind]) for linear in linears.values())


@figure
def tiles_gpu() -> str:
    """Return microseconds of a layer's linears by humming with its own tiles, and with others."""
    rows: dict[str, Callable[[str], float]] = {
        "bfloat16": lambda count: _tiles(count, "bfloat16"),
        "humming, its own tiles": lambda count: _tiles(count, "own"),
        "humming, the tiles used": lambda count: _tiles(count, "chosen"),
    }
    return by_tokens(read("metrics/size/tiles-h100.json")["tokens"], rows)


@figure
def linears_apart() -> str:
    """Return what a layer's linears take less or more in 4 bits; token-tables-h100.json."""
    tables = read("metrics/size/token-tables-h100.json")
    both = zip(*(tables[model]["bfloat16"] for model in ("quantized", "original")), strict=True)
    more = [
        packed - dense
        for tokens, (packed, dense) in zip(tables["quantized"]["tokens"], both, strict=True)
        if tokens >= 512
    ]
    return f"{-min(more):.0f} µs less to {max(more):.0f} µs more"


@figure
def tiles_rates() -> str:
    """Return the arithmetic that linears in 4 and 16 bits reach at 8 queries, and the card's peak."""
    operations = 208 * _operations()["token"] / 36
    rates = (operations / _tiles("208", kind) / 1e6 for kind in ("chosen", "bfloat16"))
    peak = gpu("rates")["bf16_flops"] / 1e12
    return " and ".join(f"{rate:.0f}" for rate in rates) + f" of {peak:.0f}"


def _sweep() -> Iterator[tuple[int, str]]:
    """Yield tokens and tile of each product of the sweep."""
    for sizes in read("metrics/size/tiles-sweep-h100.json")["sweep"].values():
        for tokens, tiles in sizes.items():
            yield from ((int(tokens), tile) for tile in tiles)


@figure
def tiles_timed() -> str:
    """Return how many products the sweep of tiles timed."""
    return f"{sum(1 for _ in _sweep()):,}"


@figure
def tiles_fitted() -> str:
    """Return how many of them the estimate of wide tiles was fitted to."""
    pairs = (tile for tokens, tile in _sweep() if 400 < tokens < 2000)
    return f"{sum(bool(re.fullmatch(r'm[0-9]+n256 (sk|no) a1', tile)) for tile in pairs):,}"


@figure
def int8_table() -> str:
    """Return microseconds of a layer's linears with either activations; token-tables-h100.json."""
    tables = read("metrics/size/token-tables-h100.json")
    columns = {
        "4-bit": ("quantized", "bfloat16"),
        "4-bit, int8 activations": ("quantized", "int8"),
        "original": ("original", "bfloat16"),
        "original, int8 activations": ("original", "int8"),
    }
    rows: list[tuple[str, ...]] = [("tokens", *columns)]
    for place, tokens in enumerate(tables["quantized"]["tokens"]):
        if tokens in (128, 256, 512, 640, 1024, 2048, 4096):
            cells = (f"{tables[model][kind][place]:,.0f}" for model, kind in columns.values())
            rows.append((f"{tokens:,}", *cells))
    return table(*rows)


@figure
def int8_from() -> str:
    """Return from how many tokens on 4 bits with int8 were faster than the original in 16 bits."""
    return f"{_int8_wins_from('original'):,}"


@figure
def int8_used_from() -> str:
    """Return from how many tokens on int8 is used: beyond the size before, see `int8_is_faster`."""
    sizes = read("metrics/size/token-tables-h100.json")["quantized"]["tokens"]
    return f"{sizes[sizes.index(_int8_wins_from('quantized')) - 1] + 1:,}"


def _int8_wins_from(other: str) -> int:
    """Return the size from which int8 on 4-bit weights was faster than 16-bit activations."""
    tables = read("metrics/size/token-tables-h100.json")
    quantized = tables["quantized"]
    rows = zip(quantized["tokens"], tables[other]["bfloat16"], quantized["int8"], strict=True)
    return next(int(tokens) for tokens, plain, int8 in rows if int8 < plain)


@figure
def int8_unpacking() -> str:
    """Return what int8 takes longer where weights are packed, the median over numbers of tokens."""
    tables = read("metrics/size/token-tables-h100.json")
    both = zip(tables["quantized"]["int8"], tables["original"]["int8"], strict=True)
    return f"{statistics.median(packed - dense for packed, dense in both):.0f} µs"


@figure
def int8_losses() -> str:
    """Return the loss of checkpoints with either activations; activations-demo.json and -39m.json."""
    losses = read("metrics/scale/activations-demo.json")["loss"]
    larger = read("metrics/scale/activations-39m.json")["loss"]["mixed"]
    rows: list[tuple[str, ...]] = [
        ("loss, pages / queries", "set", "16-bit activations", "int8", "ratio")
    ]
    named = {f"demo, `{recipe}`": kinds for recipe, kinds in losses.items()}
    for recipe, kinds in {**named, "`39m`, AutoRound by default": larger}.items():
        for page_set, plain in kinds["bfloat16"].items():
            served = kinds["int8"][page_set]
            cells = (
                " / ".join(f"{values[kind]:.6f}" for kind in ("pages", "queries"))
                for values in (plain, served)
            )
            ratio = " / ".join(times(served[kind] / plain[kind]) for kind in ("pages", "queries"))
            rows.append((recipe, page_set, *cells, ratio))
    return table(*rows)


def _cpu_ratios(kernel: str, tokens: str) -> str:
    """Return the range over the linears of a kernel's time over that of dense float32."""
    shapes = read("metrics/size/kernels-cpu.json")["shapes"].values()
    ratios = [
        shape["kernels"][kernel][tokens]["us"] / shape["kernels"]["dense float32"][tokens]["us"]
        for shape in shapes
    ]
    digits = 1 if kernel == "auto-round-lib" else 0
    return f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f}"


@figure
def cpu_kernel_26() -> str:
    """Return auto-round-lib against dense float32, 26 tokens, on two CPU cores."""
    return _cpu_ratios("auto-round-lib", "26")


@figure
def cpu_kernel_208() -> str:
    """Return the same for 208 tokens."""
    return _cpu_ratios("auto-round-lib", "208")


@figure
def cpu_plain_26() -> str:
    """Return auto-round's plain torch kernel against dense float32, 26 tokens."""
    return _cpu_ratios("auto-round torch", "26")


@figure
def parity() -> str:
    """Return how far the runtime's embeddings are from those of transformers."""
    models = read("metrics/size/parity-cuda.json")["models"]
    pairs = {
        "runtime, graphs / float32": "runtime against transformers in float32",
        "transformers, sdpa / float32": "transformers in bfloat16 against float32",
        "runtime, graphs / transformers, sdpa": "runtime against transformers in bfloat16",
        "transformers, sdpa / transformers, eager attention":
            "transformers against itself with other attention (`eager`)",
    }  # fmt: skip

    def cell(model: str, pair: str, kind: str) -> str:
        values = models[model]["cosine"][pair][kind]
        return f"{1 - values['mean']:.5f} ({values['least']:.5f})"

    rows: list[tuple[str, ...]] = [
        ("loss (minimum cosine of a token)", "4B shapes, random weights: pages", "queries",
         "demo model, `w4g128`: pages", "queries")
    ]  # fmt: skip
    for pair, name in pairs.items():
        cells = (
            cell(model, pair, kind)
            for model in ("4b-random", "demo-w4g128")
            for kind in ("pages", "queries")
        )
        rows.append((name, *cells))
    return table(*rows)


# ---- the pipeline --------------------------------------------------------------------------------
@cache
def stages() -> dict[str, Any]:
    """Return the stages of dvc.yaml, without ``foreach``."""
    from ruamel.yaml import YAML

    raw = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    return {name: {**stage.get("do", stage), "each": "do" in stage}
            for name, stage in raw["stages"].items()}  # fmt: skip


def _code(text: str) -> str:
    """Return a path or key of dvc.yaml as code, with readable placeholders."""
    text = text.replace("${key}", "<recipe>").replace("${item.calibration}", "<set>")
    return "`" + re.sub(r"[$]{([^}]+)}", r"<\1>", text) + "`"


@figure
def stage_table() -> str:
    """Return what every stage reads and writes, from dvc.yaml."""
    rows: list[tuple[str, ...]] = [("stage", "what it is", "reads", "parameters", "writes")]
    for name, body in stages().items():
        outs = [
            out if isinstance(out, str) else next(iter(out))
            for kind in ("outs", "metrics", "plots")
            for out in body.get(kind, [])
        ]
        data = [dep for dep in body["deps"] if not dep.startswith(("stages/", "colqwen3/"))]
        rows.append(
            (
                f"`{name}{'@<recipe>' if body['each'] else ''}`", body["desc"],
                ", ".join(map(_code, data)), ", ".join(map(_code, body.get("params", []))),
                ", ".join(map(_code, outs)),
            )
        )  # fmt: skip
    return table(*rows)


@figure
def reruns() -> str:
    """Return which stages depend on each folder of code, from dvc.yaml."""
    folders: dict[str, list[str]] = {}
    files: dict[str, dict[str, list[str]]] = {}
    for name, body in stages().items():
        for dep in map(Path, body["deps"]):
            if dep.parts[0] not in ("stages", "colqwen3") or len(dep.parts) < 2:
                continue
            if dep.suffix != ".py":
                folders.setdefault(str(dep), []).append(name)
            elif len(dep.parts) > 2:
                files.setdefault(str(dep.parent), {}).setdefault(dep.name, []).append(name)

    def names(users: list[str]) -> str:
        every = len(users) == len(stages())
        return "every stage" if every else ", ".join(f"`{user}`" for user in users)

    rows: list[tuple[str, ...]] = [("an edit of", "reruns", "of single files also")]
    for folder in sorted(folders | files):
        single = "; ".join(
            f"`{file}`: {names(users)}" for file, users in sorted(files.get(folder, {}).items())
        )
        rows.append((f"`{folder}`", names(folders.get(folder, [])), single))
    return table(*rows)


# ---- rewriting -----------------------------------------------------------------------------------
def fill(text: str) -> str:
    """Return a Markdown text with every figure written anew.

    Raises
    ------
    KeyError
        If a mark names no figure, or a file lacks a key.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        content = FIGURES[name]()
        block = f"\n\n{content}\n\n" if "\n" in content else content
        return f"<!-- figure {name} -->{block}<!-- end -->"

    return MARK.sub(replace, text)


def documents() -> list[Path]:
    """Return the files that may quote figures."""
    card = ROOT / "demo/model/README.md"
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), card]


def stale(path: Path) -> list[str]:
    """Return the names of a file's figures that differ from their sources."""
    text = path.read_text(encoding="utf-8")
    return [
        match["name"] for match in MARK.finditer(text) if fill(match.group(0)) != match.group(0)
    ]


def main() -> None:
    """Rewrite or check the figures."""
    parser = argparse.ArgumentParser(prog="python docs/figures.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if any differs")
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # the ablation's own code makes its tables
    differing = {path: names for path in documents() if (names := stale(path))}
    for path, names in differing.items():
        print(f"{path.relative_to(ROOT)}: {', '.join(names)}")
        if not args.check:
            path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    if args.check and differing:
        sys.exit("error: figures differ from their sources; run `python docs/figures.py`")


if __name__ == "__main__":
    main()
