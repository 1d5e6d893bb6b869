"""Whether the datasets of params.yaml hold what the recipes and the evaluation ask for."""

from collections.abc import Mapping
from pathlib import Path

from colqwen3.dataset.beir import read_dataset, read_queries
from colqwen3.dataset.pages import find_pages
from colqwen3.system.errors import UserError
from stages.calibration.sets import CalibrationParams, CalibrationSet

PARTS = {"queries": "queries.jsonl", "pages": "corpus", "passages": "texts.jsonl"}


def check_folder(key: str, folder: Path) -> None:
    """Reject a dataset that is not a folder.

    Raises
    ------
    UserError
        Naming the key of params.yaml.
    """
    if not folder.is_dir():
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
