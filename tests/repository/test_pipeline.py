"""The whole pipeline in a temporary clone, on a smaller setting, and what a change reruns."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colqwen3.system.lock import Lock
from tests.helpers.clone import (
    change,
    commit,
    copy_tree,
    differences,
    dvc,
    keep_recipes,
    left_behind,
    results,
    small_dataset,
    start_dvc,
)

RECIPES = ("w4g128", "rtn-w4g128")
PAGES = 12
OF_ALL_RECIPES = ("summary", *(f"gate@{recipe}" for recipe in RECIPES))
"""Stages that read all recipes."""

pytestmark = pytest.mark.e2e


def stale(clone: Path) -> set[str]:
    """Stages whose own deps or params changed, without what only follows from them."""
    return set(json.loads(dvc(clone, "status", "--json", "dvc.yaml").stdout or "{}"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the working tree's files, with few pages and few tuning steps."""
    folder = tmp_path_factory.mktemp("clone")
    copy_tree(folder)
    keep_recipes(folder, *RECIPES)
    small_dataset(folder / "demo/pages/evaluation", PAGES)
    for keys, value in {
        ("calibration", "sets", "mixed", "queries"): 2,
        ("calibration", "sets", "mixed", "pages"): 2,
        ("recipes", "w4g128", "iters"): 2,
        ("recipes", "w4g128", "lr"): 0.005,
        ("benchmark", "warmup"): 0,
        ("benchmark", "repeats"): 1,
    }.items():
        change(folder, *keys, value=value)
    commit(folder)
    done = dvc(folder, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_result_is_there(clone: Path) -> None:
    for recipe in RECIPES:
        quality = json.loads((clone / f"metrics/quality/{recipe}.json").read_text())
        assert quality["data"]["pages"] == PAGES
        assert 0.9 < quality["pages"]["cosine"]["mean"] < 1
        result = json.loads((clone / f"metrics/quantize/{recipe}.json").read_text())
        assert result["linears"]["planned"] == result["linears"]["quantized"] > 0
        requested = (
            {"queries": 2, "pages": 2, "samples": 4} if recipe == "w4g128" else {"samples": 0}
        )
        assert requested.items() <= result["calibration"].items()
        (timings,) = (clone / "artifacts/speed").glob(f"{recipe}-*.json")
        speed = json.loads(timings.read_text())
        assert speed["setting"]["date"] and speed["setting"]["device"]
        assert speed["query"]["batches"]["1"]["best"]["quantized_ms"] > 0
        assert (clone / f"artifacts/checkpoints/{recipe}/model.safetensors").exists()


def test_nothing_leaks_a_path(clone: Path) -> None:
    for path in [
        *clone.glob("metrics/**/*.json"),
        clone / "dvc.lock",
        clone / "artifacts/manifest.json",
    ]:
        assert str(clone.parent) not in path.read_text(), path


def test_second_run_does_nothing(clone: Path) -> None:
    before = (clone / "dvc.lock").read_bytes()
    done = dvc(clone, "repro")
    assert done.returncode == 0
    assert "Running stage" not in done.stdout
    assert (clone / "dvc.lock").read_bytes() == before


def test_forced_release_gives_the_same_folder(clone: Path) -> None:
    before = (clone / "dvc.lock").read_bytes()
    assert dvc(clone, "repro", "-f", "-s", "release@rtn-w4g128").returncode == 0
    assert (clone / "dvc.lock").read_bytes() == before


def test_two_runs_and_a_killed_one_end_well(clone: Path) -> None:
    """`python -m tests.slow.kill_repro` does this at many moments of a whole run."""
    before = results(clone)
    lock, log = Lock(clone / "artifacts/locks/embed@original.lock"), clone / ".git/log"
    assert lock.take()
    with log.open("w") as file:
        first = start_dvc(clone, "repro", "-f", "-s", "embed_original", log=file)
        while "is working on embed@original; waiting" not in log.read_text():
            assert first.poll() is None, log.read_text()
            time.sleep(0.1)
        second = dvc(clone, "repro", "-s", "embed_original")
        assert second.returncode != 0
        assert f"(PID {first.pid})" in second.stderr  # DVC says who is at it
        first.send_signal(signal.SIGTERM)
        first.wait()
    lock.release()
    third = dvc(clone, "repro")
    assert third.returncode == 0, third.stderr
    assert not left_behind(clone)
    assert results(clone) == before


def test_no_secret_is_written_anywhere(clone: Path) -> None:
    """The Hub's token is in the environment of a verbose run, and nowhere else."""
    token = "hf_" + "canaryCANARY0123456789canary0123456"
    logs = ""
    for stage in ("inspect", "embed_original"):
        done = dvc(clone, "repro", "-v", "-f", "-s", stage, env={"HF_TOKEN": token})
        assert done.returncode == 0, done.stderr
        logs += done.stdout + done.stderr
    assert "Running stage" in logs
    assert token not in logs
    for path in clone.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("keys", "value", "requested"),
    [
        (
            ("recipes", "rtn-w4g128", "group_size"),
            64,
            {"allocate", "quantize@rtn-w4g128", *OF_ALL_RECIPES},
        ),
        (("recipes", "w4g128", "iters"), 3, {"allocate", "quantize@w4g128", *OF_ALL_RECIPES}),
        (("calibration", "sets", "mixed", "pages"), 1, {"calibrate"}),
        (("benchmark", "repeats"), 2, {f"benchmark@{recipe}" for recipe in RECIPES}),
        (
            ("gate", "min_page_cosine"),
            0.25,
            {f"{stage}@{recipe}" for stage in ("evaluate", "gate") for recipe in RECIPES},
        ),
        # nothing is quantized again
        (
            ("release", "w4g128"),
            {"format": "auto_gptq"},
            {f"{stage}@{recipe}" for stage in ("gate", "release") for recipe in RECIPES},
        ),
        (("fallbacks", "w4g128"), "rtn-w4g128", {f"gate@{recipe}" for recipe in RECIPES}),
    ],
)
def test_change_makes_only_its_branch_stale(
    clone: Path, keys: tuple[str, ...], value: object, requested: set[str]
) -> None:
    before = (clone / "params.yaml").read_text()
    try:
        change(clone, *keys, value=value)
        assert stale(clone) == requested | {"check"}
    finally:
        (clone / "params.yaml").write_text(before)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("stages/tools/upload.py", set()),
        ("demo/benchmarks/size.py", set()),
        ("stages/summary.py", {"summary"}),
        ("stages/publishing/formats.py", {"release"}),
        ("stages/evaluation/overlay.py", {"evaluate", "heatmap", "summary"}),
        ("colqwen3/serving/runtime.py", {"benchmark", "embed", "embed_original"}),
        ("colqwen3/embedding/parts.py", {"embed", "embed_original"}),
        ("stages/quantization/deepstack.py", {"quantize", "sensitivity"}),
        ("stages/budget/knapsack.py", {"check", "allocate", "sensitivity"}),
    ],
)
def test_an_edit_makes_only_what_it_can_change_stale(
    clone: Path, file: str, expected: set[str]
) -> None:
    before = (clone / file).read_text()
    try:
        (clone / file).write_text(before + "\n# a comment\n")
        assert {name.partition("@")[0] for name in stale(clone)} == expected
    finally:
        (clone / file).write_text(before)


def test_a_typo_costs_nothing(clone: Path) -> None:
    before, params = results(clone), (clone / "params.yaml").read_text()
    (clone / "params.yaml").write_text(params.replace("group_size: 128", "groupsize: 128", 1))
    done = dvc(clone, "repro")
    assert done.returncode != 0
    assert "recipes.w4g128.groupsize: unknown key; did you mean group_size?" in done.stderr
    assert "Traceback" not in done.stderr
    (clone / "params.yaml").write_text(params)
    # DVC has deleted the out of the stage that failed, which is all that the typo cost
    assert differences(results(clone), before) == ["artifacts/checked.json"]
    done = dvc(clone, "repro")
    assert "Stage 'check' is cached - skipping run" in done.stdout
    assert "Running stage" not in done.stdout
    assert results(clone) == before


def test_going_back_quantizes_nothing_again(clone: Path) -> None:
    before = (clone / "params.yaml").read_text()
    checkpoint = clone / "artifacts/checkpoints/rtn-w4g128/model.safetensors"
    original = checkpoint.read_bytes()
    change(clone, "recipes", "rtn-w4g128", "bits", value=3)
    assert dvc(clone, "repro", "quantize@rtn-w4g128").returncode == 0
    assert checkpoint.read_bytes() != original
    (clone / "params.yaml").write_text(before)
    done = dvc(clone, "repro")
    assert done.returncode == 0, done.stderr
    assert "Stage 'quantize@rtn-w4g128' is cached - skipping run" in done.stdout
    assert "Running stage" not in done.stdout
    assert checkpoint.read_bytes() == original


def test_changed_calibration_reruns_the_tuned_branch_only(clone: Path) -> None:
    change(clone, "calibration", "seed", value=43)
    plan = dvc(clone, "repro", "--dry")
    running = {
        line.split("'")[1] for line in plan.stdout.splitlines() if line.startswith("Running")
    }
    assert "calibrate" in running
    assert not running & {"inspect", "embed_original"}
    done = dvc(clone, "repro", "calibrate")
    assert done.returncode == 0, done.stderr
    assert stale(clone) == {"quantize@w4g128"}


def test_forced_quantization_gives_the_same_checkpoint(clone: Path) -> None:
    assert dvc(clone, "repro", "-f", "-s", "quantize@rtn-w4g128").returncode == 0
    assert "quantize@rtn-w4g128" not in stale(clone)
    assert "embed@rtn-w4g128" not in stale(clone)


def test_a_release_is_got_by_name_and_verifies(clone: Path) -> None:
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    tag = ["tag", "-a", "w4g128@v1.0.0", "-m", "as `gto register` makes it"]
    for command in (["add", "-A"], ["commit", "-qm", "results"], tag):
        subprocess.run([*git, *command], cwd=clone, check=True)
    got = dvc(clone, "artifacts", "get", ".", "w4g128", "-o", "got")
    assert got.returncode == 0, got.stderr
    verified = subprocess.run(
        [sys.executable, "-m", "colqwen3", "verify", "got"],
        cwd=clone,
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stderr
    metadata = json.loads((clone / "got/quantization_metadata.json").read_text())
    assert len(metadata["pipeline"]["commit"]) == 40
    shutil.rmtree(clone / "got")


def test_broken_limit_fails_by_name(clone: Path) -> None:
    change(clone, "gate", "max_bytes", value=1000)
    done = dvc(clone, "repro", "-s", "gate@w4g128")
    assert done.returncode != 0
    assert "gate.max_bytes 1000" in done.stderr
    assert "w4g128 is not released" in done.stderr
    assert "Traceback" not in done.stderr
