"""Whether the datasets of params.yaml hold what the recipes and the evaluation ask for."""

from collections.abc import Collection, Mapping
from pathlib import Path

from colqwen3.dataset.beir import read_dataset, read_queries
from colqwen3.dataset.pages import find_pages
from colqwen3.system.errors import UserError
from colqwen3.system.files import path_is
from stages.calibration.sets import CalibrationParams, CalibrationSet

PARTS = {"queries": "queries.jsonl", "pages": "corpus", "passages": "texts.jsonl"}
MIN_PAGES = 16
"""Fewer pages were never measured; so many, with as many queries, were (demo/studies/ablation)."""
MIN_TEXTS = 16
"""The same of queries and passages, which both stand for the tokens of queries."""


def check_folder(key: str, folder: Path) -> None:
    """Reject a dataset that is not a folder.

    Raises
    ------
    UserError
        Naming the key of params.yaml.
    """
    if not path_is(folder, Path.is_dir):
        raise UserError(
            f"params.yaml: {key}: there is no folder {folder}; correct the path (it is relative to "
            "the root of the repository)"
        )


def check_calibration(params: CalibrationParams) -> None:
    """Check that the calibration dataset has as many items of each kind as the sets ask for.

    Raises
    ------
    UserError
        If the folder or a part of it is missing or damaged, or has too few items.
    """
    folder = Path(params.dataset)
    check_folder("calibration.dataset", folder)
    asked = _most(params.sets)
    for kind, (name, count) in asked.items():
        path = folder / PARTS[kind]
        if not count:
            continue
        available = len(find_pages(path)) if kind == "pages" else len(read_queries(path))
        if count > available:
            raise UserError(
                f"params.yaml: calibration.sets.{name}.{kind} is {count}, but {path} has "
                f"{available}; lower it"
            )


def unbalanced_sets(sets: Mapping[str, CalibrationSet], used: Collection[str]) -> list[str]:
    """Return a line for every set with too few samples of a kind, saying what that was seen to cost.

    The ratios are those of metrics/scale and of the ablation's metrics, on models of 1.6 to 152
    million parameters.

    Parameters
    ----------
    sets
        All sets by name.
    used
        Names of those that a recipe is tuned on; the others are left alone.
    """
    lines = []
    for name in used:
        counts = sets[name]
        texts = counts.queries + counts.passages
        if counts.pages == 0:
            lines.append(
                f"calibration.sets.{name} has no pages: page tokens of small models then lost 0.7 to "
                "1.0 times what they lose by rounding, with 48 pages 0.1 to 0.2 times; add pages"
            )
        elif counts.pages < MIN_PAGES:
            lines.append(
                f"calibration.sets.{name}.pages is {counts.pages}, fewer than the {MIN_PAGES} of the "
                "smallest set that was measured, so what it is worth is not known; add pages"
            )
        if texts == 0:
            lines.append(
                f"calibration.sets.{name} has no queries and no passages: query tokens of a small model "
                "then lost 1.5 times what they lose with 16 queries; add queries"
            )
        elif texts < MIN_TEXTS:
            lines.append(
                f"calibration.sets.{name}: queries and passages are {texts} together, fewer than the "
                f"{MIN_TEXTS} of the smallest set that was measured, so what it is worth is not known; add queries"
            )
    return [f"params.yaml: {line} (see docs/own-data.md)" for line in lines]


def _most(sets: Mapping[str, CalibrationSet]) -> dict[str, tuple[str, int]]:
    """Return for each kind the set that asks for most of it, and how many."""
    return {
        kind: max(
            ((name, getattr(chosen, kind)) for name, chosen in sets.items()),
            key=lambda item: item[1],
            default=("", 0),
        )
        for kind in PARTS
    }


def check_evaluation(folder: Path) -> None:
    """Check that the evaluation dataset is complete.

    Raises
    ------
    UserError
        If the folder or a part of it is missing or damaged.
    """
    check_folder("evaluate.dataset", folder)
    read_dataset(folder)
