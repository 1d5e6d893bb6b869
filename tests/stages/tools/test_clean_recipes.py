"""Which results belong to a recipe that is gone, and that nothing else is touched."""

import sys
from pathlib import Path

import pytest

from stages.tools import clean_recipes
from tests.helpers.work import make_work

OF_RECIPES = [
    "artifacts/checkpoints/{}/model.safetensors",
    "artifacts/quantize/{}.json",
    "artifacts/release/{}/README.md",
    "artifacts/embeddings/{}.safetensors",
    "artifacts/benchmark/{}.json",
    "artifacts/speed/{}-0123456789ab.json",
    "artifacts/heatmaps/{}/index.json",
    "artifacts/gate/{}.json",
    "artifacts/scratch/{}.embed/state.json",
    "artifacts/scratch/{}.fallback.lock",
    "artifacts/locks/quantize@{}.lock",
    "metrics/quality/{}.json",
    "metrics/quantize/{}.json",
    "metrics/queries/{}.json",
    "metrics/summary/{}.json",
    "metrics/plots/{}/scores.json",
]
OTHERS = [
    "artifacts/embeddings/original.safetensors",
    "artifacts/scratch/calibration.partial/index.json",
    "artifacts/locks/inspect.lock",
    "metrics/plots/ndcg.json",
    "metrics/model.json",
    "metrics/reference/summary/old-w4.json",
    "metrics/size/cuda.json",
]


@pytest.mark.parametrize("gone", ["old", "rtn-2", "rtn-w4-0123456789ab"])
def test_removed_recipes_lose_their_results_and_nobody_else(
    gone: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_work(tmp_path / "work")
    monkeypatch.chdir(folder)
    files = [Path(name.format(recipe)) for name in OF_RECIPES for recipe in ("rtn", "tuned", gone)]
    for path in [*files, *map(Path, OTHERS)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    monkeypatch.setattr(sys, "argv", ["clean_recipes"])
    clean_recipes.main()
    assert all(path.exists() for path in files)
    assert f"artifacts/checkpoints/{gone}\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["clean_recipes", "--yes"])
    clean_recipes.main()
    lost = {path for path in files if not path.exists()}
    assert lost == {Path(name.format(gone)) for name in OF_RECIPES}
    assert all(Path(name).exists() for name in OTHERS)
    capsys.readouterr()
    clean_recipes.main()
    assert capsys.readouterr().out == "nothing is left of removed recipes\n"
