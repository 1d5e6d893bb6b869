"""What several test modules share."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.evaluation.summary import quantize_metrics
from tests.helpers.allocation import write_allocations
from tests.helpers.metrics import WITHIN_THE_LIMITS, quality, write_json

RECIPE = "rtn-w4g128"


def run_stage(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a stage in a process of its own, with `folder` as the root of the repository."""
    return subprocess.run(
        [sys.executable, "-m", f"stages.{module}", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that two workers end at about the same time."""
    long = {item.path for item in items if item.get_closest_marker("e2e")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def nothing_stays_deterministic() -> Iterator[None]:
    """Take back what a test has asked torch for; other tests compare or count what is compiled."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_arguments(nothing_stays_deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the arguments of pytest from a `main()` that a test calls."""
    monkeypatch.setattr(sys, "argv", ["test"])


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with the demo model quantized by `RECIPE` and released; not to be changed."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copyfile("params.yaml", folder / "params.yaml")
    shutil.copytree("demo/model", folder / "demo/model")
    samples = folder / "artifacts/calibration/none"
    samples.mkdir(parents=True)
    (samples / "index.json").write_text('{"samples": []}')
    write_allocations(folder, folder / "demo/model", RECIPE)
    run_stages(folder, ["inspect_model"], ["quantize", RECIPE])
    record = json.loads((folder / f"artifacts/quantize/{RECIPE}.json").read_text())
    # evaluation itself takes minutes; its figures are invented
    write_json(folder / f"metrics/quantize/{RECIPE}.json", quantize_metrics(record))
    write_json(folder / f"metrics/quality/{RECIPE}.json", quality(**WITHIN_THE_LIMITS))
    run_stages(folder, ["gate", RECIPE], ["release", RECIPE])
    return folder


def run_stages(folder: Path, *stages: list[str]) -> None:
    """Run stages one after the other; all must succeed."""
    for stage in stages:
        finished = run_stage(folder, *stage)
        assert finished.returncode == 0, finished.stderr


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
