"""Where a model folder is found: on this disk, in the Hub's cache, or not at all."""

from pathlib import Path
from typing import Any

import pytest

from colqwen3.checkpoint.headers import read_headers
from colqwen3.checkpoint.hub import find_model
from tests.helpers.model_folder import cache_layout
from tests.helpers.refusal import refusal


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty Hub cache of a machine without network."""
    home = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def test_local_folder_is_taken_as_it_is(folder: Path, hub: Path) -> None:
    assert find_model(str(folder), None) == folder
    assert find_model("model", None) == Path("model")
    (hub.parent / "owner" / "name").mkdir(parents=True)
    assert find_model("owner/name", None) == Path("owner/name")


@pytest.mark.parametrize(
    "source",
    [
        "gone",
        "a/../b",
        "../b/c",
        "a/b/c",
        "/gone",
        "a//b",
        "a/..",
        "a b/c",
        "https://x/y",
        "a/" + "b" * 300,
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(hub: Path, source: str) -> None:
    said = refusal(find_model, source, None)
    assert said == f"{source}: no such folder; give a model folder or a Hub id (owner/name)"


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("models/demo-w4", "models/demo-w4g"),  # might be a Hub id
        ("./models/demo_w4g", "models/demo-w4g"),
        ("model/demo-w4g", "models/demo-w4g"),
        ("model/demo-w4", None),
        ("models/other", None),
        ("models/demo-w4g/a", None),
        ("demo-file", None),
    ],
)
def test_a_similar_folder_is_named(
    source: str, near: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "models/demo-w4g").mkdir(parents=True)
    (tmp_path / "demo-files").write_text("no folder")
    said = refusal(find_model, source, None)
    assert said.startswith(
        f"{source}: no such folder" + (f" (did you mean {near}?)" if near else "")
    )
    assert near or "did you mean" not in said


def test_a_folder_has_no_revisions(folder: Path) -> None:
    said = refusal(find_model, str(folder), "6" * 40)
    assert said.startswith(f"{folder}: is a folder, and only a Hub id has revisions; leave")


def test_file_is_no_model_folder(folder: Path) -> None:
    assert "no such folder" in refusal(find_model, str(folder / "config.json"), None)


@pytest.mark.parametrize("source", ["owner/name", "-a/b", "é/b", "a/b.git"])
@pytest.mark.parametrize("revision", [None, "6" * 40])
def test_hub_id_without_network_is_one_line(hub: Path, source: str, revision: str | None) -> None:
    said = refusal(find_model, source, revision)
    assert said.startswith(source + (f" at revision {revision}" if revision else ""))
    assert "the Hub cannot provide it" in said


def test_cached_snapshot_is_found_without_network(folder: Path, hub: Path) -> None:
    snapshot = cache_layout(folder, hub)
    for revision in ("6" * 40, None, "main"):
        assert find_model("owner/name", revision) == snapshot
    assert set(read_headers(find_model("owner/name", None))) == {"a", "b", "c"}
    assert "cannot provide it" in refusal(find_model, "owner/name", "7" * 40)


@pytest.mark.parametrize("trust", [False, True])
def test_python_files_are_fetched_for_those_who_trust_them(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    asked: dict[str, Any] = {}

    def fetch(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_model("owner/name", "6" * 40, trust) == tmp_path
    assert (asked["repo"], asked["revision"]) == ("owner/name", "6" * 40)
    patterns = asked["allow_patterns"]
    assert ("*.py" in patterns) == trust
    assert {"*.json", "*.safetensors"} <= set(patterns)
    assert not {"*", "*.bin", "*.pt", "*.pth"} & set(patterns)


@pytest.mark.parametrize(
    ("source", "revision"), [("x" * 5000, None), ("a\nb", None), ("a/b", "x\ny"), ("", None)]
)
def test_odd_source_is_one_line(hub: Path, source: str, revision: str | None) -> None:
    assert refusal(find_model, source, revision)
