"""What several test modules share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPE = "rtn-w4g128"


def run_stage(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a stage in a process of its own, with `folder` as the root of the repository."""
    return subprocess.run(
        [sys.executable, "-m", f"stages.{module}", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the arguments of pytest from a `main()` that a test calls."""
    monkeypatch.setattr(sys, "argv", ["test"])


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with the demo model quantized by `RECIPE` and released; not to be changed."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copyfile("params.yaml", folder / "params.yaml")
    shutil.copytree("demo/model", folder / "demo/model")
    for name in (f"metrics/{RECIPE}.json", f"metrics/speed/{RECIPE}.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name, folder / name)
    samples = folder / "artifacts/calibration/none"
    samples.mkdir(parents=True)
    (samples / "index.json").write_text('{"samples": []}')
    for stage in (["inspect_model"], ["quantize", RECIPE], ["release", RECIPE]):
        done = run_stage(folder, *stage)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def released(workspace: Path) -> Path:
    """Return the released folder; not to be changed."""
    return workspace / "artifacts/release" / RECIPE


@pytest.fixture
def published_4b() -> dict[str, Any]:
    """Return the sizes in the config of TomoroAI/tomoro-colqwen3-embed-4b."""
    return {
        "embed_dim": 320,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936,
        },
        "vision_config": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "num_position_embeddings": 2304, "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    }  # fmt: skip
