"""Digests against hashlib and safetensors, the layer table against the model, the commit against Git."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from colqwen3.release.provenance import (
    METADATA,
    digest_weights,
    is_sealed,
    pipeline_commit,
    seal,
    shown_path,
)


def test_digests_are_those_of_file_and_tensors(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.int32), "a": torch.randn(3, 5).bfloat16()}
    path = tmp_path / "x.safetensors"
    save_file({**tensors, "none": torch.empty(0)}, path)
    whole, actual = digest_weights(path)
    assert whole == hashlib.sha256(path.read_bytes()).hexdigest()
    assert actual.keys() == {"a", "b", "none"}
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).numpy().tobytes()
        assert actual[name] == hashlib.sha256(raw).hexdigest()


def test_released_metadata_tell_what_was_made(released: Path, workspace: Path) -> None:
    metadata = json.loads((released / METADATA).read_text())
    weights = released / "model.safetensors"
    with safe_open(weights, "pt") as file:
        packed = {name[: -len(".qweight")] for name in file.keys() if name.endswith(".qweight")}  # noqa: SIM118
        assert metadata["tensors"].keys() == set(file.keys())
        for name in (f"{next(iter(packed))}.qweight", "embedding_proj_layer.before_weight.bias"):
            raw = file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
            assert metadata["tensors"][name]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert {layer["name"] for layer in metadata["layers"]} == packed
    assert all((layer["bits"], layer["group_size"]) == (4, 128) for layer in metadata["layers"])
    files = {path.name for path in released.iterdir()} - {METADATA}
    assert metadata["files"].keys() == files
    manifest = (workspace / "artifacts/manifest.json").read_bytes()
    assert metadata["source"]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert (metadata["source"]["repo"], metadata["source"]["revision"]) == ("demo/model", None)
    assert metadata["recipe"]["name"] == metadata["recipe"]["ran"] == "rtn-w4g128"
    assert metadata["recipe"]["values"]["method"] == "rtn"
    assert metadata["calibration"]["samples"] == 0
    assert metadata["libraries"]["torch"].startswith("2.")
    assert str(workspace) not in (released / METADATA).read_text()


def test_seal_holds_every_byte_of_the_metadata() -> None:
    metadata = seal({"files": {"a": 1}, "ä": [1.5, None]})
    text = json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert is_sealed(text, json.loads(text))
    for changed in (text.replace("1.5", "1.6"), text + " ", text.replace(": 1\n", ":  1\n")):
        assert changed != text
        assert not is_sealed(changed, json.loads(changed))


def test_commit_is_the_last_of_the_pipelines_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert pipeline_commit() == {"commit": None, "dirty": None}
    git("init", "-q")
    assert pipeline_commit()["commit"] is None
    Path("params.yaml").write_text("a: 1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")
    assert pipeline_commit() == {"commit": first, "dirty": False}
    Path("dvc.lock").write_text("lock\n")
    git("add", ".")
    git("commit", "-qm", "its results")
    assert pipeline_commit() == {"commit": first, "dirty": False}
    Path("stages").mkdir()
    Path("stages/new.py").write_text("")
    assert pipeline_commit() == {"commit": first, "dirty": True}


def test_absolute_paths_are_shown_by_name() -> None:
    assert shown_path("/home/someone/models/mine") == "mine"
    assert shown_path("~/models/mine") == "mine"
    assert shown_path("TomoroAI/tomoro-colqwen3-embed-4b") == "TomoroAI/tomoro-colqwen3-embed-4b"
