"""A killed quantize stage goes on where it stopped and gives the bytes of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.helpers.allocation import write_allocations

ROOT = Path.cwd()


def stage(folder: Path, module: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{module}", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    _, log = process.communicate(timeout=600)
    assert process.returncode == 0, log
    return log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder on the demo model with two recipes that differ in nothing but the name."""
    yaml = YAML()
    params = yaml.load((ROOT / "params.yaml").read_text())
    params["model"]["source"] = str(ROOT / "demo/model")
    params["calibration"]["dataset"] = str(ROOT / "demo/pages/calibration")
    params["calibration"]["sets"] = {"small": {"queries": 3, "pages": 3, "passages": 0}}
    recipe = {"method": "autoround", "calibration": "small", "bits": 4, "group_size": 128,
              "sym": True, "iters": 40, "lr": 0.005, "seed": 3}  # fmt: skip
    params["release"] = {}
    params["recipes"] = {"calm": recipe, "killed": dict(recipe)}
    yaml.dump(params, tmp_path / "params.yaml")
    for module in ("inspect_model", "calibrate"):
        finish(stage(tmp_path, module))
    write_allocations(tmp_path, ROOT / "demo/model", "calm", "killed")
    return tmp_path


def finished_layers(folder: Path) -> int:
    """Return how many layers the scratch of ``killed`` holds, -1 before their inputs are there."""
    try:
        state = json.loads((folder / "artifacts/scratch/killed/state.json").read_text())
    except OSError:
        return -1
    return len(state["steps"])


@pytest.mark.e2e
def test_killed_runs_go_on_and_give_the_same_bytes(folder: Path) -> None:
    finish(stage(folder, "quantize", "calm"))
    logs = []
    for layers, after, sign in (
        (-1, 1.0, signal.SIGKILL),  # while libraries or the first inputs are made
        (0, 0.5, signal.SIGTERM),  # in the first layer
        (1, 0.0, signal.SIGKILL),  # as soon as the first layer is recorded
        (2, 0.4, signal.SIGTERM),  # in the third
    ):
        process = stage(folder, "quantize", "killed")
        while finished_layers(folder) < layers:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(sign)
        logs.append(process.communicate()[1])
        assert process.returncode == -sign
        assert not (folder / "artifacts/checkpoints/killed").exists()
    logs.append(finish(stage(folder, "quantize", "killed")))
    assert "continuing" not in logs[1]
    assert "continuing after layer 1 of" in logs[3]
    assert "continuing after layer 2 of" in logs[4]
    checkpoints = folder / "artifacts/checkpoints"
    for path in sorted((checkpoints / "calm").iterdir()):
        assert (checkpoints / "killed" / path.name).read_bytes() == path.read_bytes(), path.name
    calm, killed = (folder / f"artifacts/quantize/{name}.json" for name in ("calm", "killed"))
    assert calm.read_text() == killed.read_text().replace('"ran": "killed"', '"ran": "calm"')
    assert not (folder / "artifacts/scratch/killed").exists()
