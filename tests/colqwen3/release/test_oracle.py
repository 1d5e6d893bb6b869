"""The parity oracle, with vectors that the publisher's own code recorded for a small model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from colqwen3.checkpoint.layout import linears
from colqwen3.model.loading import load_model, load_processor
from colqwen3.release.oracle import (
    TOMORO_4B,
    check_model,
    compute_scores,
    find_pages,
    judge,
)
from colqwen3.system.errors import UserError
from tests.helpers.golden import write_golden_pages
from tests.helpers.recorded_oracle import GOLDEN, recorded
from tests.helpers.rounded import rounded


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_golden_pages(tmp_path_factory.mktemp("oracle") / "pages")


def scores_of(folder: Path, pages: Path) -> torch.Tensor:
    oracle = recorded()
    model, processor = (
        load_model(folder, torch.float32, torch.device("cpu")),
        load_processor(folder, 1280),
    )
    return compute_scores(oracle, find_pages(oracle, pages), model, processor)


def test_the_public_numbers_are_as_published() -> None:
    # sentence-transformers' own test of its multi-vector encoder
    assert TOMORO_4B.scores[0] == (12.74590, 8.98804, 6.31755, 5.91395)
    assert TOMORO_4B.scores[1] == (4.58117, 10.76462, 4.75141, 5.33277)
    assert len(TOMORO_4B.queries) == 2
    assert len(TOMORO_4B.pages) == 4


def test_exact_scores_pass_and_others_fail() -> None:
    exact = torch.tensor(TOMORO_4B.scores)
    assert judge(TOMORO_4B, exact, quantized=False)["verdict"] == "pass"
    for row, column, error in ((0, 0, 0.0011), (1, 3, -0.0011), (1, 1, float("nan"))):
        wrong = exact.clone()
        wrong[row, column] += error
        result = judge(TOMORO_4B, wrong, quantized=False)
        assert result["verdict"] == "fail"
    assert result["largest_difference"] == float("inf")
    assert judge(TOMORO_4B, exact + 0.0009, quantized=False)["verdict"] == "pass"


def test_a_quantized_model_is_told_its_loss_and_must_keep_the_first_pages() -> None:
    exact = torch.tensor(TOMORO_4B.scores)
    result = judge(TOMORO_4B, exact * 0.98, quantized=True)
    assert (result["verdict"], result["first_pages_kept"]) == ("pass", 2)
    assert result["largest_difference"] == pytest.approx(12.7459 * 0.02, abs=1e-4)
    assert result["mean_relative_difference"] == pytest.approx(0.02, abs=1e-4)
    swapped = judge(TOMORO_4B, exact.flip(0), quantized=True)
    assert (swapped["verdict"], swapped["first_pages_kept"]) == ("fail", 0)
    nothing = judge(TOMORO_4B, torch.full_like(exact, torch.nan), quantized=True)
    assert nothing["verdict"] == "fail"


def test_a_model_that_reproduces_recorded_scores_passes(pages: Path) -> None:
    oracle = recorded()
    result = judge(oracle, scores_of(GOLDEN / "model", pages), quantized=False)
    assert result["verdict"] == "pass", result
    # and would not with other weights: the tolerance separates
    assert oracle.tolerance < 0.1 * max(map(max, oracle.scores))


def test_a_quantized_model_shows_a_loss(pages: Path, tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "model/config.json").read_text())
    wide = [name for name, shape in linears(config).items() if shape[1] % 32 == 0]
    folder = rounded(GOLDEN / "model", tmp_path, *wide)
    oracle = recorded()
    scores = scores_of(folder, pages)
    assert judge(oracle, scores, quantized=False)["verdict"] == "fail"
    assert judge(oracle, scores, quantized=True)["largest_difference"] > oracle.tolerance


def test_another_model_is_rejected(published_4b: dict[str, dict[str, int]]) -> None:
    check_model(TOMORO_4B, published_4b)
    for text in ({"hidden_size": 256}, {}, None):
        with pytest.raises(UserError, match=r"text_config\.hidden_size is .* 2560"):
            check_model(TOMORO_4B, {"text_config": text})


def test_pages_are_found_once_each(tmp_path: Path) -> None:
    oracle = dataclasses.replace(TOMORO_4B, pages=("doc1.jpg", "doc2.jpg"))
    (tmp_path / "in").mkdir()
    for name in ("doc1.jpg", "in/doc2.jpg"):
        (tmp_path / name).touch()
    assert find_pages(oracle, tmp_path) == [tmp_path / "doc1.jpg", tmp_path / "in/doc2.jpg"]
    (tmp_path / "doc2.jpg").touch()
    with pytest.raises(UserError, match=r"doc2\.jpg: is there twice"):
        find_pages(oracle, tmp_path)
    with pytest.raises(UserError, match=r"doc1\.jpg: no such file; give the folder"):
        find_pages(oracle, tmp_path / "none")
