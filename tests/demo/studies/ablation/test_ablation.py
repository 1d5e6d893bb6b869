"""The ablation: recipes in folders of their own, and tables checked against figures by hand."""

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json, write_json
from demo.studies.ablation import study
from demo.studies.ablation.study import (
    AblationParams,
    Workspace,
    group_seeds,
    load_ablation,
    measure_recipe,
    own_params,
    table,
)
from stages.checking.params import Params
from stages.pipeline.params import load_params

TUNED, PLAIN = "mixed-w4g128-seed1", "rtn-w4g128"


@pytest.fixture
def params() -> Params:
    return load_params(Params)


@pytest.fixture
def ablation() -> AblationParams:
    return load_ablation()


def figures(page: float, query: float = 0.5, change: float = 0.0, size: int = 1000) -> Any:
    return {
        "data": {"pages": 4, "queries": 9},
        "pages": {"cosine": {"mean": page}},
        "queries": {"cosine": {"mean": query}},
        "retrieval": {
            "pearson": 0.75,
            "spearman": 0.875,
            "ndcg_at_5": {"difference": change, "low": change - 0.25, "high": change + 0.5},
        },
        "size": {"files": {"quantized": size}},
    }


def test_a_recipe_of_one_seed_is_a_row_of_its_figures() -> None:
    row = table({"rtn-w4": figures(0.99, 0.98, -0.125, 1234567)}).splitlines()[2]
    assert row == (
        "| `rtn-w4` | 0.01000 | 0.02000 | 0.75000 | 0.87500 "
        "| -0.1250 [-0.3750, +0.3750] | 1,234,567 |"
    )


def test_seeds_are_one_row_of_mean_and_sample_deviation() -> None:
    # 1 - cosine: 0.1, 0.2, 0.6: mean 0.3, deviations -0.2, -0.1, 0.3, so sqrt(0.14 / 2)
    pages = (0.9, 0.8, 0.4)
    metrics = {f"a-seed{i}": figures(page, change=i / 10) for i, page in enumerate(pages)}
    lines = table({**metrics, "a": figures(0.5)}).splitlines()
    assert lines[2].startswith("| `a` (4 seeds) |")
    del metrics["a-seed2"]
    lines = table(metrics | {"a-seed30": figures(0.4, change=0.2), "b": figures(1)}).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:3] == ["`a` (3 seeds)", "0.30000 ± 0.26458", "0.50000 ± 0.00000"]
    assert cells[5] == "+0.1000 [-0.1500, +0.6000]"
    assert len(lines) == 4


def test_only_a_seed_at_the_end_of_a_name_groups() -> None:
    names = ["b-seed2", "a-seed1-x", "b-seed1", "seed3", "b"]
    assert group_seeds(names) == {
        "b": ["b-seed2", "b-seed1", "b"], "a-seed1-x": ["a-seed1-x"], "seed3": ["seed3"],
    }  # fmt: skip


def test_shipped_rows_differ_in_the_seed_alone(ablation: AblationParams) -> None:
    for members in group_seeds(list(ablation.recipes)).values():
        result = []
        for name in members:
            recipe = ablation.recipes[name].model_dump(exclude={"seed", "calibration"})
            used = ablation.sets.get(ablation.recipes[name].calibration)
            result.append((recipe, used and used.model_dump(exclude={"seed"})))
        assert all(one == result[0] for one in result)


@pytest.mark.parametrize("recipe", [TUNED, PLAIN])
def test_own_params_are_valid_and_know_one_recipe(
    recipe: str,
    params: Params,
    ablation: AblationParams,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = own_params(params, ablation, "evaluation2", recipe)
    path = tmp_path / "params.yaml"
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(values, file)
    root = Path.cwd()
    monkeypatch.chdir(tmp_path)
    own = load_params(Params, path)
    assert own.recipes == {recipe: ablation.recipes[recipe]}
    used = {} if recipe == PLAIN else {"mixed-seed1": ablation.sets["mixed-seed1"]}
    assert own.calibration.sets == used
    assert own.evaluate.dataset == str(root / "demo/pages/evaluation2")
    assert own.calibration.dataset == str(root / "demo/pages/calibration")
    assert own.model == params.model.model_copy(update={"source": str(root / "demo/model")})
    assert own.embed == params.embed


def test_a_hub_id_stays_one(params: Params, ablation: AblationParams) -> None:
    model = params.model.model_copy(update={"source": "owner/name"})
    values = own_params(params.model_copy(update={"model": model}), ablation, "evaluation", TUNED)
    assert values["model"]["source"] == "owner/name"


def test_what_is_not_there_is_refused(params: Params, ablation: AblationParams) -> None:
    with pytest.raises(UserError, match=r"recipes\.w4: there is none.*known: rtn-"):
        own_params(params, ablation, "evaluation", "w4")
    with pytest.raises(UserError, match=r"datasets\.evaluaton: .* did you mean evaluation\?"):
        own_params(params, ablation, "evaluaton", TUNED)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("datasets", {}, "at least 1 item"),
        ("datasets", {"first": 3}, "datasets.first"),
        ("datasets", {"quantize": "x"}, "'quantize' is reserved"),
        ("sets", {"none": {"queries": 1, "pages": 0, "passages": 0}}, "'none' is reserved"),
        ("sets", {}, "is not a set of sets (known: none yet)"),
        ("gate", {}, "gate: unknown key"),
    ],
)
def test_wrong_params_are_refused(
    section: str, value: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = YAML(typ="safe", pure=True)
    values = yaml.load(study.ABLATION / "params.yaml")
    values[section] = value
    with (tmp_path / "params.yaml").open("w") as file:
        yaml.dump(values, file)
    monkeypatch.setattr(study, "ABLATION", tmp_path)
    with pytest.raises(UserError) as caught:
        load_ablation()
    assert message in str(caught.value)


@pytest.fixture
def elsewhere(
    params: Params, ablation: AblationParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """An empty repository root, once both files of parameters have been read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "inspect_folder", lambda _: ({"files": {}}, {"files_bytes": 1}))
    monkeypatch.setattr(study, "find_model", lambda *_: tmp_path)
    return tmp_path


def test_a_recipe_runs_through_the_stages_and_leaves_its_metrics_only(
    elsewhere: Path, params: Params, ablation: AblationParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dataset in ("evaluation", "evaluation2"):
        path = study.ORIGINALS / f"{dataset}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dataset)
    calls = []

    def stage(space: Workspace, name: str, *args: str) -> None:
        dataset = Path(load_params(Params, space.folder / "params.yaml").evaluate.dataset).name
        calls.append((name, *args, dataset))
        assert read_json(space.folder / "metrics/model.json", "") == {"files_bytes": 1}
        if name == "evaluate":
            original = space.folder / "artifacts/embeddings/original.safetensors"
            assert original.read_text() == dataset
            write_json(space.folder / f"metrics/quality/{TUNED}.json", {"on": dataset})
            write_json(space.folder / f"metrics/quantize/{TUNED}.json", {"made": TUNED})

    monkeypatch.setattr(Workspace, "run", stage)
    before = {path for path in elsewhere.rglob("*") if path.is_file()}
    figures = measure_recipe(params, ablation, TUNED)
    assert calls == [
        ("calibrate", "evaluation"),
        ("allocate", "evaluation"),
        ("quantize", TUNED, "evaluation"),
        ("embed", TUNED, "evaluation"),
        ("evaluate", TUNED, "evaluation"),
        ("embed", TUNED, "evaluation2"),
        ("evaluate", TUNED, "evaluation2"),
    ]
    assert figures == {
        "quantize": {"made": TUNED},
        "evaluation": {"on": "evaluation"},
        "evaluation2": {"on": "evaluation2"},
    }
    assert {path for path in elsewhere.rglob("*") if path.is_file()} == before


def test_code_is_proven_by_equal_figures(
    elsewhere: Path, params: Params, ablation: AblationParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, known = [], dict.fromkeys(study.PROVEN, 1.0)
    monkeypatch.setattr(study, "embed_original", lambda *args: drawn.append(args[2]))
    monkeypatch.setattr(
        study, "measure_recipe", lambda *args: {"quantize": {"b": known[args[2]], "new": 1}}
    )
    monkeypatch.setattr(study, "code_digest", lambda stage: f"digest of {stage}")
    for name in study.PROVEN:
        write_json(study.METRICS / f"{name}.json", {"quantize": {"b": 1.0, "recipe": 0}})
    known["mixed-w3g128-seed1"] = 1.000001
    with pytest.raises(UserError, match=r"mixed-w3g128-seed1\.json: .* gives another quantize.b"):
        study.prove(params, ablation)
    assert not study.PROOF.exists()
    known["mixed-w3g128-seed1"] = 1.0
    study.prove(params, ablation)
    assert read_json(study.PROOF, "")["code"]["quantize"] == "digest of quantize"
    assert drawn == 2 * ["evaluation", "evaluation2"]


def test_the_figures_are_of_the_present_code() -> None:
    proven = read_json(study.PROOF, study.FIX)["code"]
    if changed := sorted(
        stage for stage, digest in study.code().items() if proven[stage] != digest
    ):
        pytest.skip(
            f"the ablation's figures were made by other code of {', '.join(changed)}: run "
            "`python -m demo.studies.ablation --prove` (2 minutes)"
        )


def test_a_failing_stage_is_named(elsewhere: Path, params: Params) -> None:
    space = Workspace(elsewhere / "work", params)
    with pytest.raises(UserError, match="work: stage no_such_stage failed"):
        space.run("no_such_stage")


def test_tables_need_results(
    elsewhere: Path, ablation: AblationParams, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"ablation/metrics: holds no results"):
        study.print_tables(ablation)
    path = elsewhere / study.METRICS / f"{TUNED}.json"
    write_json(path, {"evaluation": figures(0.5), "evaluation2": figures(0.25)})
    study.print_tables(ablation)
    printed = capsys.readouterr().out
    assert printed.index("demo/pages/evaluation: 4 pages, 9 queries") < printed.index("0.50000")
    assert "0.75000" in printed.split("demo/pages/evaluation2:")[1]
    write_json(path, {"evaluation": {"data": {}}})
    with pytest.raises(UserError, match="lacks a figure"):
        study.print_tables(ablation)
