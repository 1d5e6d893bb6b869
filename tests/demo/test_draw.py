"""The demo's pages: redrawn the same, two sets with nothing in common, answers on their pages."""

from pathlib import Path

from demo.draw import SETS, draw_set
from stages.dataset import read_dataset

PAGES = Path("demo/pages")


def test_drawing_gives_the_committed_files(tmp_path: Path) -> None:
    plan = min(SETS, key=lambda plan: plan.groups)
    draw_set(plan, tmp_path)
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    kept = sorted(p.relative_to(PAGES) for p in (PAGES / plan.name).rglob("*") if p.is_file())
    assert drawn == kept
    for path in drawn:
        assert (tmp_path / path).read_bytes() == (PAGES / path).read_bytes(), path


def test_calibration_and_evaluation_are_disjoint() -> None:
    one, other = read_dataset(PAGES / "evaluation"), read_dataset(PAGES / "calibration")
    assert not set(one.queries.values()) & set(other.queries.values())
    assert not set(one.queries) & set(other.queries)
    pixels = [
        {page.path.read_bytes() for page in dataset.pages.values()} for dataset in (one, other)
    ]
    assert not pixels[0] & pixels[1]


def test_sets_are_as_large_as_promised() -> None:
    evaluation = read_dataset(PAGES / "evaluation")
    assert len(evaluation.pages) >= 100
    assert len(evaluation.queries) >= 200
    assert sum(path.stat().st_size for path in PAGES.rglob("*.png")) < 10e6
