"""The end of `make repro`: what came out, where it is, what to do next.

`python -m stages.tools.results` prints one row per recipe, the smallest recipe that keeps the gate's
limits, and one line that says whether figures moved against the authors' in metrics/reference.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json
from stages.checking.params import Params
from stages.evaluation.limits import WORSE, Verdict, judge
from stages.evaluation.summary import loss
from stages.pipeline.params import load_params
from stages.pipeline.paths import (
    CHECKPOINTS,
    QUALITY_METRICS,
    QUANTIZE_METRICS,
    REFERENCE,
    RELEASES,
    REPORT,
    SUMMARIES,
)
from stages.publishing.options import ReleaseOptions
from stages.tools.reference import MACHINE, describe_params

HEAD = ("recipe", "verdict", "size", "page loss", "query loss", "first pages changed")
TOLERANCES = {
    "cos_page": 1e-5,
    "cos_query": 1e-5,
    "ndcg5": 0.0015,
    "ndcg5_mixed": 0.0015,
    "ndcg5_orig": 0.0015,
    "recall1": 0.008,
    "top1_same": 0.008,
    "lower": 3,
    "higher": 3,
}
"""How far the figures of a tuned recipe moved between two kinds of CPU; other figures stay."""
LAST_DIGIT = {key: 1e-6 if key.startswith("cos_") else 1e-5 for key in TOLERANCES}
"""How far those of plain rounding may move: its last bits can fall on both sides of a rounding."""
NOISE = 1e-9  # of the subtraction of two decimals


@dataclass(frozen=True)
class Row:
    """One recipe that was evaluated."""

    name: str
    verdict: Verdict
    size: int
    page_loss: float
    query_loss: float
    changed: int
    queries: int
    ran: str
    current: bool

    def cells(self) -> tuple[str, ...]:
        """Return the row as the table shows it."""
        return (
            self.name if self.ran == self.name else f"{self.name} (by {self.ran})",
            self.verdict.verdict,
            f"{self.size / 1e6:,.1f} MB",
            f"{self.page_loss:.6f}",
            f"{self.query_loss:.6f}",
            f"{self.changed} of {self.queries}",
        )


def read_row(recipe: str, params: Params) -> Row | None:
    """Return a recipe's row; None if it was not evaluated.

    Raises
    ------
    UserError
        If its metrics are damaged or lack a figure.
    """
    path, fix = QUALITY_METRICS / f"{recipe}.json", f"run `dvc repro evaluate@{recipe}`"
    if not path.exists():
        return None
    metrics = read_json(path, fix)
    record = read_json(QUANTIZE_METRICS / f"{recipe}.json", fix)
    try:
        ran, values = record["recipe"]["ran"], record["recipe"]["values"]
        now = params.recipes.get(ran)
        return Row(
            name=recipe,
            verdict=judge(metrics, params.gate),
            size=metrics["size"]["files"]["quantized"],
            page_loss=loss(metrics["pages"]["cosine"]["mean"]),
            query_loss=loss(metrics["queries"]["cosine"]["mean"]),
            changed=metrics["retrieval"]["first_pages"]["changed"],
            queries=metrics["data"]["queries"],
            ran=ran,
            current=now is not None
            and now.model_dump() == values
            and (CHECKPOINTS / recipe).is_dir(),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: lacks a figure ({error}); {fix}") from None


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines of columns of one width, the first two left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if place < 2 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def choose_smallest(rows: Sequence[Row]) -> Row | None:
    """Return the smallest recipe that breaks no limit; of equal sizes, the one that lost less."""
    passing = [row for row in rows if row.verdict.verdict != WORSE]
    return min(passing, key=lambda row: (row.size, row.page_loss), default=None)


def find_moved(
    summary: Mapping[str, Any], reference: Mapping[str, Any], tuned: bool
) -> tuple[list[str], bool]:
    """Return what moved against the reference, and whether another kind of CPU explains it.

    Parameters
    ----------
    summary, reference
        ``metrics/summary/<recipe>.json`` of this run and of the authors.
    tuned
        Whether the recipe is tuned; plain rounding gives the same figures everywhere.
    """
    moved, explained = [], True
    for key in sorted(summary.keys() | reference.keys()):
        now, before = summary.get(key), reference.get(key)
        if now == before:
            continue
        moved.append(f"{key} {before} → {now}")
        tolerance = (TOLERANCES if tuned else LAST_DIGIT).get(key, 0)
        if not (_is_number(now) and _is_number(before) and abs(now - before) <= tolerance + NOISE):
            explained = False
    return moved, explained


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float)


def compare_reference(params: Params, folder: Path = REFERENCE) -> str:
    """Say in one line how the results differ from the authors', as far as they can be compared.

    Raises
    ------
    UserError
        If a file is damaged.
    """
    fix = "restore it with `git checkout`"
    if not (folder / MACHINE).exists():
        return f"Reference: there is none in {folder}."
    machine, ours = read_json(folder / MACHINE, fix), describe_params(params)
    try:
        theirs, where = machine["params"], f"{machine['device']}, {machine['date']}"
        others = {key for key in ours if key != "recipes" and ours[key] != theirs[key]}
        names = [
            name for name in ours["recipes"] if ours["recipes"][name] == theirs["recipes"].get(name)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MACHINE}: lacks {error}; {fix}") from None
    names = [name for name in names if (SUMMARIES / f"{name}.json").exists()]
    if others or not names:
        return "Reference: the authors' figures have other parameters, so they are not compared."
    moved, explained = [], True
    for name in names:
        summary, reference = (
            read_json(path / f"{name}.json", fix) for path in (SUMMARIES, folder / SUMMARIES.name)
        )
        tuned = params.recipes[name].method != "rtn"
        changes, within = find_moved(summary, reference, tuned)
        moved += [f"{name} {change}" for change in changes]
        explained &= within
    if not moved:
        return f"Reference: every figure equals the authors' ({where})."
    how_far = "within" if explained else "beyond"
    return (
        f"Reference: moved {how_far} what another kind of CPU changes, against the authors' "
        f"({where}): {', '.join(moved)}."
    )


def is_released(row: Row, params: Params) -> bool:
    """Whether the folder of a recipe's release is of this run: a broken limit leaves an old one."""
    allowed = params.release.get(row.name, ReleaseOptions()).even_if_worse
    return (RELEASES / row.name).is_dir() and (row.verdict.verdict != WORSE or allowed)


def describe(params: Params) -> list[str]:
    """Return the lines to print."""
    rows = {name: read_row(name, params) for name in params.recipes}
    evaluated = [row for row in rows.values() if row and row.current]
    outdated = [row.name for row in rows.values() if row and not row.current]
    missing = [name for name, row in rows.items() if row is None]
    lines = align([HEAD, *(row.cells() for row in evaluated)])
    lines += ["", *(f"{row.name}: {row.verdict.reason}" for row in evaluated)]
    if missing:
        lines.append(f"Not evaluated: {', '.join(missing)}.")
    if outdated:
        lines.append(f"Results of earlier parameters, not shown: {', '.join(outdated)}.")
    smallest = choose_smallest(evaluated)
    lines.append(
        f"Smallest recipe within the limits: {smallest.name} ({smallest.size:,} bytes)."
        if smallest
        else "No recipe is within the limits."
    )
    report = REPORT / "index.html"
    released = [RELEASES / row.name for row in evaluated if is_released(row, params)]
    best = RELEASES / smallest.name if smallest else None
    lines += [
        compare_reference(params),
        "",
        f"Report:   {report}{'' if report.exists() else ' (`make report` writes it)'}",
        f"Released: {', '.join(map(str, released)) or 'nothing'}",
        "Next:     "
        + (
            f"python -m stages.tools.upload {best} OWNER/NAME   (lists and prints, sends nothing)"
            if best in released
            else "change a recipe or a limit in params.yaml, then make repro"
        ),
    ]
    return lines


def main() -> None:
    """Print the results."""
    argparse.ArgumentParser(prog="python -m stages.tools.results", description=__doc__).parse_args()
    print("\n".join(describe(load_params(Params))))


if __name__ == "__main__":
    run(main)
