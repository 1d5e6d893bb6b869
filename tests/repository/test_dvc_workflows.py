"""What users of DVC do beside `dvc repro`: share results through a remote, and run experiments."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.clone import change, commit, copy_tree, dvc, keep_recipes, small_dataset

RECIPE = "rtn-w4g128"
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]

pytestmark = pytest.mark.e2e


def run(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one recipe, its results committed and pushed to a remote of DVC."""
    home = tmp_path_factory.mktemp("workflows")
    folder = home / "clone"
    folder.mkdir()
    copy_tree(folder)
    small_dataset(folder / "demo/pages/evaluation", 3)
    keep_recipes(folder, RECIPE)
    change(folder, "release", value={})
    change(folder, "calibration", "sets", "mixed", value={"queries": 1, "pages": 0, "passages": 0})
    change(folder, "benchmark", "repeats", value=1)
    change(folder, "benchmark", "warmup", value=0)
    commit(folder)
    assert dvc(folder, "remote", "add", "-d", "store", str(home / "store")).returncode == 0
    done = dvc(folder, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    run(folder, *GIT, "add", "-A")
    run(folder, *GIT, "commit", "-qm", "results")
    done = dvc(folder, "push")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_pull_into_a_fresh_clone_leaves_nothing_to_run(clone: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "-q", str(clone), "fresh")
    fresh = tmp_path / "fresh"
    done = dvc(fresh, "pull")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (fresh / f"artifacts/release/{RECIPE}/README.md").exists()
    done = dvc(fresh, "repro")
    assert done.returncode == 0, done.stderr
    assert "Running stage" not in done.stdout
    assert not subprocess.check_output(["git", "status", "--porcelain"], cwd=fresh)
    assert not (fresh / "artifacts/speed").exists()  # timings are of one machine


def test_results_of_the_same_machine_leave_the_tree_clean(clone: Path) -> None:
    assert dvc(clone, "repro", "-f", "-s", f"benchmark@{RECIPE}").returncode == 0
    assert dvc(clone, "repro", "-f", "-s", f"evaluate@{RECIPE}").returncode == 0
    assert not subprocess.check_output(["git", "status", "--porcelain"], cwd=clone)


def test_experiments_run_in_a_temporary_copy_and_from_the_queue(clone: Path) -> None:
    done = dvc(clone, "exp", "run", "--temp", "--name", "looser", "-S", "gate.min_page_cosine=0.25")
    assert done.returncode == 0, done.stdout + done.stderr
    queued = dvc(
        clone, "exp", "run", "--queue", "--name", "queued", "-S", "gate.min_page_cosine=0.125"
    )
    assert queued.returncode == 0, queued.stderr
    assert dvc(clone, "queue", "start", "-j", "1").returncode == 0
    assert dvc(clone, "queue", "logs", "-f", "queued").returncode == 0
    shown = dvc(clone, "exp", "show", "--json")
    assert shown.returncode == 0
    text = json.dumps(json.loads(shown.stdout))
    assert '"looser"' in text and '"queued"' in text
    assert not subprocess.check_output(["git", "status", "--porcelain"], cwd=clone)
    applied = dvc(clone, "exp", "apply", "looser")
    assert applied.returncode == 0, applied.stderr
    assert "min_page_cosine: 0.25" in (clone / "params.yaml").read_text()
    run(clone, "git", "checkout", "-q", ".")
    assert dvc(clone, "checkout").returncode == 0


def test_a_removed_recipe_leaves_nothing_behind(clone: Path) -> None:
    """Its name was only changed, which is to remove it and to add another."""
    text = (clone / "params.yaml").read_text()
    (clone / "params.yaml").write_text(text.replace(f"  {RECIPE}:", "  plain:"))
    yaml = (clone / "dvc.yaml").read_text()
    try:
        done = dvc(clone, "repro")
        assert done.returncode == 0, done.stderr
        bars = json.loads((clone / "metrics/plots/ndcg.json").read_text())
        assert {bar["recipe"] for bar in bars} == {"plain"}
        assert RECIPE not in dvc(clone, "metrics", "show").stdout
        for command in ([], ["--yes"]):
            cleaned = subprocess.run(
                ["python", "-m", "stages.tools.clean_recipes", *command],
                cwd=clone, capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert f"artifacts/checkpoints/{RECIPE}" in cleaned.stdout
        left = [path for path in clone.glob("metrics/**/*") if RECIPE in str(path)]
        left = [path for path in left if "reference" not in path.parts]
        left += [path for path in clone.glob("artifacts/**/*") if RECIPE in str(path)]
        assert not left
        assert (clone / "artifacts/checkpoints/plain/model.safetensors").exists()
    finally:
        (clone / "dvc.yaml").write_text(yaml)
