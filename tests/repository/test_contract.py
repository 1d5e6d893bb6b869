"""dvc.yaml, params.yaml, imports and folders must tell the same story."""

import ast
import hashlib
import importlib
import json
import random
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from demo.studies.ablation.study import STAGES as ABLATION_STAGES
from tests.helpers.clone import copy_tree

CODE = ("colqwen3", "stages", "demo")
# what comes later may import what comes before, and nothing the other way round; modules of one
# layer may import each other, except that no stage imports a stage
LAYERS = (
    ("colqwen3/",),
    ("stages/pipeline/", "stages/__init__.py"),
    ("stages/quantization/", "stages/calibration/", "stages/evaluation/", "stages/publishing/"),
    ("stages/budget/",),
    ("stages/checking/",),
    ("stages/",),
    ("demo/",),
)
ABLATION = Path("demo/studies/ablation")
EXACT = ("quantize", "embed", "embed_original", "benchmark")
"""Stages so expensive that nothing superfluous may rerun them."""


def read_yaml(path: Path | str) -> Any:
    return YAML(typ="safe", pure=True).load(Path(path).read_text())


PARAMS: dict[str, Any] = read_yaml("params.yaml")
PIPELINE: dict[str, Any] = read_yaml("dvc.yaml")["stages"]
BODIES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage) for name, stage in PIPELINE.items()
}
MODULES = sorted(path for root in CODE for path in Path(root).rglob("*.py"))


# ---- Imports ------------------------------------------------------------------------------------


@cache
def imported_modules(path: Path) -> frozenset[Path]:
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
        if name.split(".")[0] in CODE:
            file = Path(*name.split("."))
            files |= {file.with_suffix(".py"), file / "__init__.py", file.parent / "__init__.py"}
    return frozenset(file for file in files if file.exists()) - {path}


def needed_modules(*modules: Path) -> set[Path]:
    """A module and all that it imports, and what that imports; templates beside them too."""
    needed: set[Path] = set()
    queue = list(modules)
    while queue:
        path = queue.pop()
        if path not in needed:
            needed.add(path)
            queue += [] if is_empty(path) else imported_modules(path)
    templates = {path.with_suffix(".md.jinja") for path in needed}
    return {path for path in needed | templates if path.exists() and not is_empty(path)}


@cache
def is_empty(path: Path) -> bool:
    """Whether a module is a docstring alone: nothing in it changes a result."""
    if path in (Path("stages/__init__.py"), Path("colqwen3/__init__.py")):
        return True  # the former notes a process number, the latter only forwards names
    return path.suffix == ".py" and len(ast.parse(path.read_text()).body) <= 1


def layer(path: Path) -> int:
    return next(
        number for number, starts in enumerate(LAYERS) if path.as_posix().startswith(starts)
    )


def is_stage(path: Path) -> bool:
    return path.parent == Path("stages") and path.name != "__init__.py"


def test_imports_are_found_in_every_form(tmp_path: Path) -> None:
    code = (
        "import colqwen3.system.files\nfrom stages.pipeline import paths\n"
        "def f():\n    from colqwen3.system.errors import run\n"
    )
    (tmp_path / "m.py").write_text(code)
    names = {path.as_posix() for path in imported_modules(tmp_path / "m.py")}
    assert {
        "colqwen3/system/files.py", "stages/pipeline/paths.py", "colqwen3/system/errors.py",
    } <= names  # fmt: skip
    relative = imported_modules(Path("colqwen3/model/processing_colqwen3.py"))
    assert Path("colqwen3/model/scoring.py") in relative


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_have_one_direction(module: Path) -> None:
    for other in imported_modules(module):
        assert layer(other) <= layer(module), f"{module} imports {other}"
        assert not (is_stage(module) and is_stage(other)), f"{module} imports the stage {other}"
        tool = other.as_posix().startswith("stages/tools/")
        assert not (is_stage(module) and tool), f"{module} imports the tool {other}"


def test_the_direction_of_imports_is_said_in_contributing() -> None:
    text = " ".join(Path("CONTRIBUTING.md").read_text().split()).replace("`", "")
    for name in ("colqwen3", "stages/pipeline", "stages/checking", "demo"):
        assert name in text


def test_there_are_no_import_circles() -> None:
    # a package's own __init__ may import what lies in it
    graph = {
        module: {other for other in imported_modules(module) if other.name != "__init__.py"}
        for module in MODULES
        if module.name != "__init__.py"
    }
    assert list(TopologicalSorter(graph).static_order())


def test_no_package_shadows_another() -> None:
    roots = {path.name for path in Path().iterdir() if (path / "__init__.py").exists()}
    roots |= {"tests"}
    assert not roots & sys.stdlib_module_names
    installed = {
        name
        for name, distributions in packages_distributions().items()
        if set(distributions) != {"colqwen3-autoround"}
    }
    assert not (roots - {"tests"}) & installed


def test_the_library_imports_no_code_of_the_pipeline() -> None:
    for module in Path("colqwen3").rglob("*.py"):
        assert all(other.parts[0] == "colqwen3" for other in imported_modules(module)), module


# ---- dvc.yaml -----------------------------------------------------------------------------------


def code_deps(body: dict[str, Any]) -> list[Path]:
    return [Path(dep) for dep in body["deps"] if dep.startswith(("stages/", "colqwen3/"))]


def module_of(body: dict[str, Any]) -> Path:
    return Path(body["cmd"].split()[2].replace(".", "/") + ".py")


def covers(dep: Path, file: Path) -> bool:
    return dep == file or dep in file.parents


@pytest.mark.parametrize("name", BODIES)
def test_deps_cover_all_that_a_stage_imports_and_none_is_needless(name: str) -> None:
    deps, needed = code_deps(BODIES[name]), needed_modules(module_of(BODIES[name]))
    uncovered = [file for file in needed if not any(covers(dep, file) for dep in deps)]
    assert not uncovered
    assert all(dep.exists() for dep in deps)
    needless = [dep for dep in deps if not any(covers(dep, file) for file in needed)]
    assert not needless


@pytest.mark.parametrize("name", EXACT)
def test_expensive_stages_depend_on_nothing_superfluous(name: str) -> None:
    needed = needed_modules(module_of(BODIES[name]))
    covered = {
        file
        for dep in code_deps(BODIES[name])
        for file in ([dep] if dep.is_file() else dep.rglob("*.py"))
        if not is_empty(file)
    }
    assert covered - needed == set()


def test_dvc_yaml_can_be_read_at_once() -> None:
    assert len(Path("dvc.yaml").read_text().splitlines()) <= 220


def test_every_other_stage_follows_the_check() -> None:
    """So a typo is found before DVC deletes the outs of any other stage."""

    def sources(name: str) -> set[str]:
        outs = {
            stage: [next(iter(out)) if isinstance(out, dict) else out for out in all_outs(body)]
            for stage, body in BODIES.items()
        }
        return {
            stage
            for stage, paths in outs.items()
            for out in paths
            for dep in BODIES[name]["deps"]
            if stage != name and (dep.startswith(out) or out.startswith(f"{dep}/"))
        }

    reached, queue = set(), ["summary", *BODIES]
    for start in queue:
        seen, open_names = set(), [start]
        while open_names:
            current = open_names.pop()
            if current not in seen:
                seen.add(current)
                open_names += sources(current)
        assert "check" in seen, start
        reached.add(start)
    assert reached == set(BODIES)


def all_outs(body: dict[str, Any]) -> list[Any]:
    return [out for kind in ("outs", "metrics", "plots") for out in body.get(kind, [])]


@pytest.mark.parametrize("name", ["quantize", "embed", "embed_original", "calibrate", "benchmark"])
def test_expensive_stages_have_cached_outs_only(name: str) -> None:
    """One out that DVC does not cache keeps it from restoring any of them from its run cache."""
    assert all(isinstance(out, str) for out in all_outs(BODIES[name]))


@pytest.mark.parametrize("name", BODIES)
def test_params_of_stages_exist(name: str) -> None:
    for key in BODIES[name].get("params", []):
        assert_key(PARAMS, key.replace("${key}", next(iter(PARAMS["recipes"]))))


def assert_key(params: Any, key: str) -> None:
    value: Any = params
    for part in key.split("."):
        assert part in value, key
        value = value[part]


@pytest.mark.parametrize("name", BODIES)
def test_stages_declare_the_sections_that_they_read(name: str) -> None:
    module: Any = importlib.import_module(
        module_of(BODIES[name]).with_suffix("").as_posix().replace("/", ".")
    )
    read = set(module.Params.model_fields)
    declared = {key.split(".")[0] for key in BODIES[name].get("params", [])}
    # read after a failure only, and checked again by the gate
    unlisted = {"fallbacks"}
    if name == "embed_original":  # what recipes are served with says nothing about the original
        unlisted |= {"serving"}
    assert read - unlisted <= declared
    assert declared <= read | {"fallbacks"}


def test_every_section_of_params_is_used() -> None:
    used = {key.split(".")[0] for body in BODIES.values() for key in body.get("params", [])}
    assert used == PARAMS.keys()


def test_every_stage_says_what_it_does() -> None:
    assert all(body.get("desc") for body in BODIES.values())


def test_large_outs_lie_in_the_ignored_folder_and_metrics_in_git() -> None:
    for body in BODIES.values():
        small = [out for out in body.get("outs", []) if isinstance(out, dict)]
        large = [out for out in body.get("outs", []) if out not in small]
        assert all(out.startswith("artifacts/") for out in large)
        for entry in [*small, *body.get("metrics", []), *body.get("plots", [])]:
            ((path, options),) = entry.items()
            assert path.startswith("metrics/")
            assert options["cache"] is False
    # without a slash at the end, the pattern matches a link too
    assert "/artifacts" in Path(".gitignore").read_text().splitlines()


def test_no_run_writes_the_reference_figures() -> None:
    outs = [
        next(iter(out)) if isinstance(out, dict) else out
        for b in BODIES.values()
        for out in all_outs(b)
    ]
    assert not [out for out in outs if out.startswith(("metrics/reference", "metrics/size"))]


def test_every_recipe_is_a_named_artifact() -> None:
    entries = read_yaml("dvc.yaml")["artifacts"]
    assert entries.keys() == PARAMS["recipes"].keys()
    for recipe, entry in entries.items():
        assert (entry["type"], entry["path"]) == ("model", f"artifacts/release/{recipe}")


# ---- The ablation, a project of its own ---------------------------------------------------------


def test_the_ablation_depends_on_its_data_and_runs_the_stages_whose_code_is_proven() -> None:
    stages = read_yaml(ABLATION / "dvc.yaml")["stages"]
    params = read_yaml(ABLATION / "params.yaml")
    source = (ABLATION / "study.py").read_text()
    assert set(re.findall(r'\.run\("(\w+)"', source)) == set(ABLATION_STAGES)
    for name, body in stages.items():
        for key in body["do"]["params"]:
            if isinstance(key, str):
                section = "datasets" if name == "original" else "recipes"
                assert_key(params, key.replace("${key}", next(iter(params[section]))))
            else:
                for outside in key["../../../params.yaml"]:
                    assert_key(PARAMS, outside)


def test_the_ablation_is_no_part_of_the_pipeline() -> None:
    assert (ABLATION / ".dvc/config").exists()
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--all"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "ablation" not in listed


# ---- Tests and requirements ---------------------------------------------------------------------


def test_tests_mirror_the_folders() -> None:
    """A module has a test file of its own, in the same place, or others of its kind import it."""
    without = {"paths.py", "__init__.py", "__main__.py", "configuration_colqwen3.py"}
    imported: dict[str, set[Path]] = {
        root: set().union(
            *(imported_modules(test) for test in (Path("tests") / root).rglob("*.py"))
        )
        for root in CODE
    }
    missing = [
        str(path)
        for path in MODULES
        if path.parts[0] != "demo"  # programs there are run as a whole
        and path.name not in without
        and not (Path("tests") / path.with_name(f"test_{path.name}")).exists()
        and path not in imported[path.parts[0]]
    ]
    assert not missing
    homeless = [
        str(test)
        for root in CODE
        for test in (Path("tests") / root).rglob("test_*.py")
        if not Path(*test.parent.parts[1:]).is_dir()
    ]
    assert not homeless


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-corpus.txt"])
def test_requirements_are_pinned_and_name_no_address(file: str) -> None:
    lines = Path(file).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", pin) for pin in pins)
    assert "torchvision" not in {pin.split("==")[0] for pin in pins}


@pytest.mark.parametrize(
    "module",
    [
        path.with_suffix("").as_posix().replace("/", ".")
        for path in MODULES
        if path.parts[0] == "stages" and "def main" in path.read_text()
    ],
)
def test_help_does_nothing_else(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = importlib.import_module(module)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        imported.main()
    assert caught.value.code == 0
    assert f"usage: python -m {module}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_users_own_results_fail_no_test(tmp_path: Path) -> None:
    """`make repro` rewrites metrics; on another machine or with other parameters they differ."""
    copy_tree(tmp_path)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    generator = random.Random(1)
    changed = 0
    for folder in ("summary", "quality", "quantize", "queries", "plots"):
        for path in (tmp_path / "metrics" / folder).rglob("*.json"):
            text = re.sub(
                r"(?<=[:\[ ])\d+\.\d+", lambda _: f"{generator.random():.5f}", path.read_text()
            )
            changed += text != path.read_text()
            path.write_text(text)
    assert changed
    (tmp_path / "dvc.lock").unlink()
    tests = [
        "tests/repository/test_docs.py", "tests/stages/publishing", "tests/stages/evaluation",
        "tests/stages/tools",
    ]  # fmt: skip
    without_results = [  # of the tests that read none, those that take longest
        "tests/stages/evaluation/test_memory.py",
        "tests/repository/test_docs.py::test_the_report_on_deepstack_is_short_and_true",
        "tests/repository/test_docs.py::test_the_report_on_mteb_is_true",
    ]
    apart = [f"--deselect={name}" for name in without_results]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *apart, *tests],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_lock_is_that_of_the_pipeline() -> None:
    """Every stage of the authors' recipes has run, and committed results are those that it wrote."""
    lock = read_yaml("dvc.lock")["stages"]
    authors = json.loads(Path("metrics/reference/machine.json").read_text())["params"]["recipes"]
    names = {
        f"{name}@{recipe}" if "foreach" in PIPELINE[name] else name
        for name in PIPELINE
        for recipe in authors
    }
    assert names <= lock.keys()
    for entry in lock:  # of other recipes too, but of no stage that is gone
        name, is_of_recipe, _ = entry.partition("@")
        assert name in PIPELINE, entry
        assert bool(is_of_recipe) == ("foreach" in PIPELINE[name]), entry
    compared = 0
    for name in names:
        for out in lock[name].get("outs", []):
            path = Path(out["path"])
            if path.parts[0] == "metrics" and path.is_file():
                assert hashlib.md5(path.read_bytes()).hexdigest() == out["md5"], path
                compared += 1
    assert compared
