"""The beginning of the checks of engines; their rest needs an environment for each engine."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slow.engines import ROOT, begin, check_parser


class FirstStepError(Exception):
    """Ends a check where its work begins."""


def test_a_check_begins_with_its_recipe_and_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["check", "--recipe", "small", "--environments", "here"])
    with begin(check_parser("check", None)) as (args, checkpoint, work):
        assert (args.recipe, args.environments) == ("small", Path("here"))
        assert checkpoint == ROOT / "artifacts/checkpoints/small"
        assert work.is_dir() and not list(work.iterdir())
    assert not work.exists()


@pytest.mark.parametrize(
    ("check", "step"),
    [
        ("check_colpali", "make_inputs"),
        ("check_transformers", "own_embeddings"),
        ("check_vllm", "make_inputs"),
    ],
)
def test_checks_come_to_their_first_step(
    monkeypatch: pytest.MonkeyPatch, check: str, step: str
) -> None:
    module: Any = importlib.import_module(f"tests.slow.{check}")
    given: list[Path] = []

    def first(folder: Path, *_: Any, **__: Any) -> None:
        given.append(folder)
        raise FirstStepError

    monkeypatch.setattr(sys, "argv", [check, "--recipe", "small"])
    monkeypatch.setattr(module, step, first)
    with pytest.raises(FirstStepError):
        module.main()
    (folder,) = given
    if step == "make_inputs":
        assert ROOT not in folder.parents and not folder.parent.exists()
    else:
        assert folder == ROOT / "artifacts/checkpoints/small"
