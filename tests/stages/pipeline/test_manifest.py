"""Later stages take the model from the manifest, and only the one that was inspected."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from colqwen3.inspection import inspect_folder
from colqwen3.system.errors import UserError
from colqwen3.system.files import write_json
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import ModelParams

GOLDEN = Path("tests/golden/model")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


@pytest.fixture
def manifest(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_json(tmp_path / "manifest.json", inspect_folder(model)[0])
    return read_manifest(tmp_path / "manifest.json")


def params(source: Path, revision: str | None = None) -> ModelParams:
    return ModelParams(
        source=str(source), revision=revision, trust_remote_code=False, max_num_visual_tokens=1280
    )


def test_the_inspected_model_is_found(model: Path, manifest: dict[str, Any]) -> None:
    assert find_inspected_model(params(model), manifest) == model


def test_a_copy_elsewhere_is_the_same_model(manifest: dict[str, Any]) -> None:
    assert find_inspected_model(params(GOLDEN), manifest) == GOLDEN


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model-00002-of-00003.safetensors"]
)
def test_a_changed_model_is_refused(model: Path, manifest: dict[str, Any], name: str) -> None:
    data = bytearray((model / name).read_bytes())
    data[len(data) // 2] ^= 1
    (model / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: changed since it was inspected"):
        find_inspected_model(params(model), manifest)


def test_another_model_is_refused(manifest: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="changed since it was inspected"):
        find_inspected_model(params(Path("demo/model")), manifest)


def test_a_missing_model_is_refused(manifest: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such folder"):
        find_inspected_model(params(tmp_path / "gone"), manifest)


@pytest.mark.parametrize("text", [None, "", '{"files": {'])
def test_missing_or_damaged_manifest_names_the_command(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "manifest.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert said.endswith("; run `dvc repro inspect`")
    assert len(said.splitlines()) == 1


# ---- Known gap: strict, so that fixing it asks for moving the case into the table above ----------


@pytest.mark.parametrize("value", [[], None, {}, {"linears": {}}, {"files": []}])
def test_json_that_is_no_manifest_is_refused(model: Path, tmp_path: Path, value: object) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError):
        find_inspected_model(params(model), read_manifest(path))
