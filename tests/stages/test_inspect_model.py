"""The stage `inspect` writes what inspection gives, and no path of this machine."""

import json
import shutil
from pathlib import Path

import pytest

from colqwen3.inspection import inspect_folder
from colqwen3.system.errors import UserError
from stages import inspect_model

GOLDEN = Path("tests/golden/model").absolute()


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with params.yaml and a model as `dvc repro` would find them."""
    shutil.copytree(GOLDEN, tmp_path / "demo" / "model")
    shutil.copyfile("params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["inspect_model"])
    text = Path("params.yaml").read_text()
    assert text.count("  source: demo/model\n") == 1
    return tmp_path


def test_stage_writes_manifest_and_metrics_without_paths(project: Path) -> None:
    inspect_model.main()
    manifest, metrics = inspect_folder(project / "demo" / "model")
    files = [project / "artifacts" / "manifest.json", project / "metrics" / "model.json"]
    manifest["trust_remote_code"] = False  # for whoever asks whether code of the folder ran
    assert [json.loads(path.read_text()) for path in files] == [manifest, metrics]
    before = [path.read_bytes() for path in files]
    assert not any(str(project).encode() in text for text in before)
    inspect_model.main()
    assert [path.read_bytes() for path in files] == before


def test_stage_leaves_earlier_results_alone_when_it_fails(project: Path) -> None:
    inspect_model.main()
    files = [project / "artifacts" / "manifest.json", project / "metrics" / "model.json"]
    before = [path.read_bytes() for path in files]
    truncate(project / "demo" / "model")
    with pytest.raises(UserError):
        inspect_model.main()
    assert [path.read_bytes() for path in files] == before
    assert sorted(path.name for path in project.iterdir()) == [
        "artifacts", "demo", "metrics", "params.yaml",
    ]  # fmt: skip


def test_hub_id_must_be_pinned(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("source: demo/model", "source: owner/name"))
    with pytest.raises(UserError, match=r"no folder owner/name; correct it, or .* model\.revision"):
        inspect_model.main()
    assert not (project / "artifacts").exists()
