"""dvc.yaml, params.yaml, imports and README must tell the same story."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages.tools import ablation

STAGES = Path("stages")


def read_yaml(path: str) -> Any:
    return YAML(typ="safe", pure=True).load(Path(path).read_text())


PARAMS: dict[str, Any] = read_yaml("params.yaml")
PIPELINE: dict[str, Any] = read_yaml("dvc.yaml")["stages"]
BODIES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage) for name, stage in PIPELINE.items()
}
ABLATION: dict[str, dict[str, Any]] = {
    name: stage["do"] for name, stage in read_yaml("ablation/dvc.yaml")["stages"].items()
}


def imported_modules(path: Path) -> set[Path]:
    """The project's own files that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = list(path.with_suffix("").parts[: -node.level]) if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    files = set()
    for name in names:
        if name.split(".")[0] == "stages":
            path = Path(*name.split("."))
            files |= {path.with_suffix(".py"), path / "__init__.py", path.parent / "__init__.py"}
    return {file for file in files if file.exists()}


def needed_modules(module: Path) -> set[Path]:
    found: set[Path] = set()
    queue = [module]
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += imported_modules(path)
    return found - {STAGES / "__init__.py"}  # nothing there changes a result


@pytest.mark.parametrize("name", BODIES)
def test_deps_are_the_modules_that_the_stage_imports(name: str) -> None:
    body = BODIES[name]
    module = Path(body["cmd"].split()[2].replace(".", "/") + ".py")
    listed = {Path(dep) for dep in body["deps"] if dep.startswith("stages/")}
    needed = needed_modules(module)
    assert listed == needed | templates(needed)


def templates(modules: set[Path]) -> set[Path]:
    """The files that modules fill in."""
    found = (path.with_suffix(".md.jinja") for path in modules)
    return {path for path in found if path.exists()}


@pytest.mark.parametrize(
    ("name", "function"),
    [("original", ablation.embed_original), ("recipe", ablation.measure_recipe)],
)
def test_deps_of_the_ablation_are_the_modules_of_the_stages_that_it_runs(
    name: str, function: Any
) -> None:
    run = re.findall(r'\.run\("(\w+)"', inspect.getsource(function))
    assert run
    needed = set().union(*(needed_modules(STAGES / f"{module}.py") for module in run))
    listed = {Path(dep) for dep in ABLATION[name]["deps"] if dep.startswith("stages/")}
    assert listed == needed | needed_modules(STAGES / "ablation.py")


def test_the_ablation_writes_nothing_that_the_pipeline_depends_on() -> None:
    outs = [
        out if isinstance(out, str) else next(iter(out))
        for body in ABLATION.values()
        for out in body["outs"]
    ]
    depended = {dep for body in BODIES.values() for dep in body["deps"]}
    assert outs
    for out in outs:
        assert not {str(part) for part in [Path(out), *Path(out).parents]} & depended
    assert all(body["wdir"] == ".." for body in ABLATION.values())


def test_the_ablation_depends_on_every_dataset_that_it_measures_on() -> None:
    wanted = {f"${{ablation.datasets.{name}}}" for name in PARAMS["ablation"]["datasets"]}
    assert wanted <= set(ABLATION["recipe"]["deps"])


def test_imports_are_found_in_every_form(tmp_path: Path) -> None:
    code = "import stages.files\nfrom stages import paths\ndef f():\n    from stages.errors import run\n"
    (tmp_path / "m.py").write_text(code)
    found = {path.name for path in imported_modules(tmp_path / "m.py")}
    assert found == {"__init__.py", "files.py", "paths.py", "errors.py"}
    relative = imported_modules(STAGES / "colqwen3/processing_colqwen3.py")
    assert STAGES / "colqwen3/scoring.py" in relative


@pytest.mark.parametrize("name", BODIES)
def test_params_of_stages_exist(name: str) -> None:
    for key in BODIES[name].get("params", []):
        assert_key(key.replace("${key}", next(iter(PARAMS["recipes"]))))


def assert_key(key: str) -> None:
    value: Any = PARAMS
    for part in key.split("."):
        assert part in value, key
        value = value[part]


@pytest.mark.parametrize(("name", "section"), [("original", "datasets"), ("recipe", "recipes")])
def test_params_of_the_ablation_exist(name: str, section: str) -> None:
    for key in ABLATION[name]["params"]:
        assert_key(key.replace("${key}", next(iter(PARAMS["ablation"][section]))))


def test_every_section_of_params_is_used() -> None:
    bodies = [*BODIES.values(), *ABLATION.values()]
    used = {key.split(".")[0] for body in bodies for key in body.get("params", [])}
    assert used == PARAMS.keys()


def test_every_stage_says_what_it_does() -> None:
    assert all(body.get("desc") for body in [*BODIES.values(), *ABLATION.values()])


def test_large_outs_lie_in_the_ignored_folder_and_metrics_in_git() -> None:
    for body in BODIES.values():
        small = [out for out in body.get("outs", []) if isinstance(out, dict)]
        large = [out for out in body.get("outs", []) if out not in small]
        assert all(out.startswith("artifacts/") for out in large)
        for entry in [*small, *body.get("metrics", []), *body.get("plots", [])]:
            ((path, options),) = entry.items()
            assert path.startswith("metrics/")
            assert options["cache"] is False
    assert "/artifacts/" in Path(".gitignore").read_text().splitlines()


def test_stage_modules_do_not_shadow_the_standard_library() -> None:
    assert not {path.stem for path in STAGES.glob("*.py")} & sys.stdlib_module_names


def test_tests_mirror_stages() -> None:
    modules = [path for path in STAGES.rglob("*.py") if path.name != "__init__.py"]
    tested = {path.name for path in Path("tests").rglob("test_*.py")}
    # constants, and what every other test goes through
    without = {"paths.py", "configuration_colqwen3.py"}
    missing = [
        str(path)
        for path in modules
        if f"test_{path.name}" not in tested | {f"test_{n}" for n in without}
    ]
    assert not missing


def test_requirements_are_pinned_and_name_no_address() -> None:
    lines = Path("requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", pin) for pin in pins)
    assert "torchvision" not in {pin.split("==")[0] for pin in pins}


def test_readme_shows_the_dag() -> None:
    command = [sys.executable, "-m", "dvc", "dag", "--md", "dvc.yaml"]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert drawn.strip() in Path("README.md").read_text()


@pytest.mark.parametrize("recipe", PARAMS["recipes"])
def test_readme_quotes_the_committed_metrics(recipe: str) -> None:
    readme = Path("README.md").read_text()
    metrics = json.loads(Path(f"metrics/{recipe}.json").read_text())
    ndcg = metrics["retrieval"]["ndcg_at_5"]
    quoted = [
        *(f"{1 - metrics[kind]['cosine']['mean']:.5f}" for kind in ("pages", "queries")),
        f"{ndcg['quantized']:.4f} (difference {ndcg['difference']:+.4f}, "
        f"95 % [{ndcg['low']:+.4f}, {ndcg['high']:+.4f}])",
        f"{metrics['retrieval']['recall_at_1']['quantized']:.4f}",
        f"{metrics['size']['files']['quantized']:,}",
    ]
    assert not [figure for figure in quoted if figure not in readme]


def test_every_recipe_is_a_named_artifact() -> None:
    entries = read_yaml("dvc.yaml")["artifacts"]
    assert entries.keys() == PARAMS["recipes"].keys()
    for recipe, entry in entries.items():
        assert (entry["type"], entry["path"]) == ("model", f"artifacts/release/{recipe}")


@pytest.mark.parametrize(
    "module", [path.stem for path in sorted(STAGES.glob("*.py")) if "def main" in path.read_text()]
)
def test_help_does_nothing_else(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.import_module(f"stages.{module}")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        found.main()
    assert caught.value.code == 0
    assert f"usage: python -m stages.{module}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
