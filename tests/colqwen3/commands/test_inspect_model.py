"""`colqwen3 inspect` prints what inspection gives as JSON, from headers alone."""

import json
import shutil
from pathlib import Path

import pytest

from colqwen3.inspection import inspect_folder
from tests.helpers.cli import run_command

GOLDEN = Path("tests/golden/model")


def test_command_prints_the_json_of_the_stage() -> None:
    done = run_command("inspect", GOLDEN)
    assert (done.returncode, done.stderr) == (0, "")
    manifest, metrics = inspect_folder(GOLDEN)
    assert json.loads(done.stdout) == {"manifest": manifest, "metrics": metrics}


def test_command_ends_with_status_0_and_writes_nothing(tmp_path: Path) -> None:
    done = run_command("inspect", GOLDEN.resolve(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["metrics"] == inspect_folder(GOLDEN)[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("no/such/folder", "no/such/folder: no such folder"),
        ("owner/name", "the Hub cannot provide it"),
        ("tests", "config.json: cannot be read"),
        ("{damaged}", "its header says"),
    ],
)
def test_bad_folder_is_one_line_and_status_1(tmp_path: Path, model: str, part: str) -> None:
    if model == "{damaged}":
        folder = Path(shutil.copytree(GOLDEN, tmp_path / "model"))
        path = sorted(folder.glob("*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:-1])
        model = str(folder)
    done = run_command(
        "inspect", model, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert part in done.stderr
