"""Models of several sizes and recipes, each written as GGUF files once."""

import json
import math
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from colqwen3.checkpoint.layout import tensors
from colqwen3.gguf.export import export_gguf
from stages.quantization.allocation import uniform
from stages.quantization.recipes import RtnRecipe
from tests.helpers.rounded import allocated

DEMO = Path("demo/model")
RECIPES: dict[str, dict[str, Any]] = {
    "w4g32": {"bits": 4, "group_size": 32},
    "w4g128": {"bits": 4, "group_size": 128},
    "w3g64": {"bits": 3, "group_size": 64},
    "w8g128": {"bits": 8, "group_size": 128},
    "w4g32-8": {"bits": 4, "group_size": 32, "token_embeddings": 8, "vision": 8},
    "w8g64-4": {"bits": 8, "group_size": 64, "token_embeddings": 4, "vision": {"mlp": 4}},
}
Maker = Callable[[str], Path]


def enlarged(folder: Path, rows: int) -> Path:
    """Write the demo model with more token embeddings, zeros that take no room on the disk."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))
    header, place = {}, 0
    for name, shape in tensors(config).items():
        end = place + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Return what makes a model folder: `demo`, `other` sizes, or the demo model by a recipe."""

    @cache
    def make(name: str) -> Path:
        if name == "demo":
            return DEMO
        folder = tmp_path_factory.mktemp(name)
        if name == "other":  # the sections of its rotary embeddings are beyond llama.cpp
            shutil.copytree("tests/golden/model", folder, dirs_exist_ok=True)
            config = json.loads((folder / "config.json").read_text())
            config["text_config"]["rope_scaling"]["mrope_section"] = [6, 5, 5]
            (folder / "config.json").write_text(json.dumps(config))
            return folder
        recipe = RtnRecipe(method="rtn", calibration="none", sym=True, **RECIPES[name])
        config = json.loads((DEMO / "config.json").read_text())
        return allocated(DEMO, folder, uniform(name, recipe, config), recipe)

    return make


@pytest.fixture(scope="session")
def exported(models: Maker, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what writes a model of `models` as GGUF files; the folder is not to be changed."""

    @cache
    def make(name: str, dtype: str = "float16") -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-gguf")
        export_gguf(models(name), folder, dtype)
        return folder

    return make
