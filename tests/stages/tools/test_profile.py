"""Profiles change the values that they name, and nothing else of params.yaml."""

import difflib
import shutil
import sys
from pathlib import Path

import pytest

from colqwen3.system.errors import UserError
from stages.checking.params import Params
from stages.pipeline.params import load_params, read_yaml
from stages.tools import profile

NAME = "tomoro-colqwen3-embed-4b"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def apply(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["profile", *words])
    profile.main()


def changed_lines(before: str) -> list[str]:
    after = Path("params.yaml").read_text().splitlines()
    lines = difflib.ndiff(before.splitlines(), after)
    return [line[2:] for line in lines if line.startswith("+ ")]


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "profiles").glob("*.yaml")])
def test_every_profile_gives_exactly_its_values(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = read_yaml(folder / "params.yaml")
    apply(monkeypatch, name)
    values = profile.read_profile(name)
    after = dict(profile._flatten(read_yaml(folder / "params.yaml")))
    assert {key: after[key] for key in values} == values
    untouched = {key: value for key, value in profile._flatten(before) if key not in values}
    assert {key: after[key] for key in after if key not in values} == untouched
    load_params(Params)


def test_comments_order_and_layout_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "params.yaml").read_text()
    apply(monkeypatch, NAME)
    after = (folder / "params.yaml").read_text()
    assert [line for line in after.splitlines() if line.lstrip().startswith("#")] == [
        line for line in before.splitlines() if line.lstrip().startswith("#")
    ]
    assert len(after.splitlines()) == len(before.splitlines())
    values = profile.read_profile(NAME)
    assert len(changed_lines(before)) <= len(values)
    assert "  revision: 6a32fb68598730bf5620fbf18d832c784235c59c" in changed_lines(before)
    assert "  query_batches: [1, 8, 64]" in changed_lines(before)


def test_no_values_change_no_byte() -> None:
    text = (ROOT / "params.yaml").read_text()
    assert profile.apply(text, {}) == text


def test_further_settings_win(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(
        monkeypatch, NAME, "model.source=/models/4b", "model.revision=null", "embed.dtype=float32"
    )
    params = load_params(Params)
    assert params.model.source == "/models/4b"
    assert params.model.revision is None
    assert params.embed.dtype == "float32"
    assert params.benchmark.dtype == "bfloat16"
    assert "  revision: null" in Path("params.yaml").read_text().splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tomoro-colqwen3-embed-4"], f"no profile .*did you mean {NAME}"),
        ([NAME, "evaluate.datasets=x"], r"evaluate\.datasets: unknown key; did you mean dataset\?"),
        ([NAME, "evalute.dataset=x"], r"no section 'evalute'; did you mean evaluate\?"),
        ([NAME, "embed.dtype=float64"], r"embed\.dtype: .*float64.*nothing was written"),
        ([NAME, "embed.dtype.x=1"], r"dtype is no section"),
        ([NAME, "embed"], "is not KEY=VALUE"),
        ([NAME, "embed.dtype=[1"], "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    before = (folder / "params.yaml").read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        apply(monkeypatch, *words)
    assert "\n" not in str(caught.value)
    assert (folder / "params.yaml").read_bytes() == before


def test_the_profile_pins_a_commit_and_trusts_no_code() -> None:
    values = read_yaml(ROOT / "profiles" / f"{NAME}.yaml")["model"]
    assert len(values["revision"]) == 40
    assert values["trust_remote_code"] is False
