"""The demo's calibration data and its evaluation data have nothing in common."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from colqwen3.dataset.beir import read_queries

PAGES = Path("demo/pages")
CALIBRATION = PAGES / "calibration"
EVALUATIONS = sorted(PAGES.glob("evaluation*"))


def pixels(folder: Path) -> set[str]:
    """Digests of the decoded pages: equal pictures are found in whatever file they are stored."""
    digests = set()
    for path in (folder / "corpus").iterdir():
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        digests.add(hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest())
    return digests


def normalised(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def texts(folder: Path) -> set[str]:
    files = [path for name in ("queries", "texts") if (path := folder / f"{name}.jsonl").exists()]
    return {normalised(text) for file in files for text in read_queries(file).values()}


def test_there_is_something_to_compare() -> None:
    assert PAGES / "evaluation" in EVALUATIONS
    assert normalised("Fee: £5, at the DOOR.") == "fee5atthedoor"


@pytest.mark.parametrize("evaluation", EVALUATIONS, ids=lambda path: path.name)
@pytest.mark.parametrize("items", [pixels, texts])
def test_calibration_shares_nothing_with_evaluation(
    items: Callable[[Path], set[str]], evaluation: Path
) -> None:
    tuned_on, measured_on = items(CALIBRATION), items(evaluation)
    assert len(tuned_on) >= 16
    assert len(measured_on) >= 100
    assert not tuned_on & measured_on
