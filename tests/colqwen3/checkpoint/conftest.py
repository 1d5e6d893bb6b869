"""A small model folder for what reads headers, fingerprints and the Hub's cache."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.model_folder import write_index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a model folder of two shards: a and b in one, c in the other."""
    home = tmp_path / "model"
    home.mkdir()
    shards = {"one.safetensors": ["a", "b"], "two.safetensors": ["c"]}
    for file, names in shards.items():
        save_file({name: torch.arange(6.0).reshape(2, 3) for name in names}, home / file)
    write_index(home, {name: file for file, names in shards.items() for name in names})
    (home / "config.json").write_text("{}")
    return home
