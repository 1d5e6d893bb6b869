"""README, docs/ and the files around them: links, figures, commands and code are true."""

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
REPORTS = sorted((ROOT / "docs/upstream").glob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES, *REPORTS, ROOT / "demo/model/README.md"]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
README = ROOT / "README.md"
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
UNHELD = "<!-- unheld"  # after a figure of which no committed file exists


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES: Any = load(ROOT / "docs/figures.py")


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text())


STAGES: dict[str, Any] = {
    name: stage.get("do", stage) for name, stage in read_yaml(ROOT / "dvc.yaml")["stages"].items()
}


def prose(path: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", path.read_text())


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and mkdocs make it."""
    text = re.sub(r"[`*\[\]]|\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


# ---- links ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(prose(path)):
        if target.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(linked), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])
def test_pages_link_only_to_what_the_site_contains(path: Path) -> None:
    for target in LINK.findall(prose(path)):
        if not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).resolve().is_relative_to(ROOT / "docs")


def test_every_page_is_in_the_index_and_in_the_site() -> None:
    listed = set(LINK.findall((ROOT / "docs/index.md").read_text()))
    in_site = {next(iter(entry.values())) for entry in read_yaml(ROOT / "mkdocs.yml")["nav"]}
    pages = {path.name for path in PAGES}
    assert in_site == pages
    assert pages - {"index.md"} <= listed


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (docs/requirements.txt)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- figures -------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_figures_are_those_of_the_committed_files(path: Path) -> None:
    assert FIGURES.stale(path) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_marks_of_figures_are_complete(path: Path) -> None:
    text = FENCE.sub("", FIGURES.MARK.sub("", path.read_text()))
    marks = re.findall(r"(?<!`)<!-- (?:figure|end)\b", text)
    assert marks == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_no_line_of_prose_begins_with_a_comment(path: Path) -> None:
    """Markdown would take the whole line for HTML."""
    for line in prose(path).splitlines():
        if line.lstrip().startswith("<!--"):
            assert re.fullmatch(r"<!-- (figure \S+|end) -->", line), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_no_precise_figure_stands_outside_of_a_mark(path: Path) -> None:
    text = FIGURES.MARK.sub("", prose(path))
    text = re.sub(r"`[^`]*`", "", text)  # values of parameters, versions
    figures = re.finditer(r"(?<![\d.])\d+\.\d{3,}(?![\d.])(?P<after>.{0,30})", text)
    assert [match.group(0) for match in figures if UNHELD not in match["after"]] == []


def test_a_wrong_figure_is_named_and_rewritten(tmp_path: Path) -> None:
    right = FIGURES.fill("nDCG <!-- figure speedup-1-query -->9.99<!-- end --> and on")
    assert (
        right
        == f"nDCG <!-- figure speedup-1-query -->{FIGURES.speedup_1_query()}<!-- end --> and on"
    )
    page = tmp_path / "page.md"
    page.write_text(right + "\n<!-- figure size-4b -->1 GB<!-- end -->\n")
    assert FIGURES.stale(page) == ["size-4b"]


def test_the_same_documents_are_filled_and_tested() -> None:
    assert sorted(FIGURES.documents()) == sorted(DOCUMENTS)


def test_an_unknown_figure_is_an_error() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        FIGURES.fill("<!-- figure nonsense -->1<!-- end -->")


def test_figures_follow_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of the reference results that is shown changes the table when it changes."""
    before = FIGURES.demo_quality()
    real = FIGURES.read

    def changed(path: str) -> Any:
        values = json.loads(json.dumps(real(path)))
        if path == "metrics/reference/quality/w4g128.json":
            values["pages"]["cosine"]["mean"] -= 0.5
        return values

    monkeypatch.setattr(FIGURES, "read", changed)
    assert FIGURES.demo_quality() != before


def test_no_figure_reads_what_a_run_writes() -> None:
    """A user's own results differ, and nothing is wrong then."""
    sources = re.findall(r'read\(f?"([^"{]*)', (ROOT / "docs/figures.py").read_text())
    assert sources
    outs = [
        (out if isinstance(out, str) else next(iter(out))).split("$")[0]
        for body in STAGES.values()
        for kind in ("outs", "metrics", "plots")
        for out in body.get(kind, [])
    ]
    for source in sources:
        assert not any(source.startswith(out) for out in outs), source


# ---- what pages name -----------------------------------------------------------------------------
def codes(path: Path) -> Iterator[str]:
    """Yield what a page sets as code: lines of blocks and words between backticks."""
    text = path.read_text()
    for block in FENCE.finditer(text):
        yield from block.group(0).splitlines()[1:-1]
    yield from re.findall(r"`([^`]+)`", prose(path).replace("\n", " "))


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.name != "CHANGELOG.md"], ids=lambda p: p.name
)
def test_files_that_a_page_names_exist(path: Path) -> None:
    folders = ("colqwen3", "stages", "demo", "tests", "metrics", "docs", "profiles")
    named = re.compile(rf"(?<![\w./<-])(?:{'|'.join(folders)})/[\w./-]+(?![\w<*{{$-])")
    outs = ("metrics/quality", "metrics/queries", "metrics/plots", "metrics/reference")
    for code in codes(path):
        if any(character in code for character in "<*{$…"):
            continue
        for name in named.findall(code):
            if not name.startswith(outs):
                assert (ROOT / name.rstrip(".,/")).exists(), name


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "Dockerfile"], ids=[*NAMES, "Dockerfile"])
def test_commands_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    modules = re.findall(r"python -m ((?:stages|demo|tests|colqwen3)[\w.]*\b)(?!\.<)", text)
    for module in modules:
        place = ROOT / module.rstrip(".").replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    from colqwen3.cli import COMMANDS

    assert set(re.findall(r"^colqwen3 ([a-z-]+)", text, re.MULTILINE)) <= COMMANDS.keys()


def test_every_section_of_params_is_described() -> None:
    described = re.findall(
        r"^\| `(\w+)` \|", (ROOT / "docs/parameters.md").read_text(), re.MULTILINE
    )
    assert set(described) == read_yaml(ROOT / "params.yaml").keys()


def test_every_folder_is_described() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name and name[0] != "."}
    described = set(re.findall(r"^\| `([\w-]+)/` \|", README.read_text(), re.MULTILINE))
    assert folders <= described


def test_the_tree_of_the_architecture_has_every_folder() -> None:
    tree = (ROOT / "docs/architecture.md").read_text()
    for top in ("colqwen3", "stages", "demo"):
        part = tree[tree.index(f"\n{top}/") :]
        for folder in (ROOT / top).iterdir():
            if folder.is_dir() and folder.name != "__pycache__":
                assert re.search(rf"^  .*\b{folder.name}/", part, re.MULTILINE), folder


def test_the_diagram_shows_every_stage_and_only_true_dependencies() -> None:
    drawn = re.search(r"```mermaid\n(.*?)```", README.read_text(), re.DOTALL)
    assert drawn
    chains = [
        [re.sub(r"\[.*?\]", "", node).strip() for node in line.split("-->")]
        for line in drawn[1].splitlines()[1:]
    ]
    assert {node for chain in chains for node in chain} == STAGES.keys()
    for chain in chains:
        for before, after in pairwise(chain):
            assert depends(after, before), (before, after)


def depends(stage: str, on: str) -> bool:
    outs = [
        out if isinstance(out, str) else next(iter(out))
        for kind in ("outs", "metrics", "plots")
        for out in STAGES[on].get(kind, [])
    ]
    plain = [dep.replace("${item.calibration}", "x") for dep in STAGES[stage]["deps"]]
    return any(
        dep == out or dep.startswith(out + "/") or out.startswith(dep + "/")
        for dep in plain
        for out in outs
    )


def test_contributing_states_the_direction_of_imports() -> None:
    sentence = (
        "`colqwen3 <- stages/pipeline <- stages/{calibration,quantization,evaluation,publishing} <- "
        "stages/budget <- stages/checking <- stages/*.py and stages/tools <- demo`"
    )
    assert sentence in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_wording(path: Path) -> None:
    """The table of CONTRIBUTING.md, as far as words alone can tell."""
    text = prose(path)
    if path.name == "CONTRIBUTING.md":
        text = re.sub(r"^\|.*\|$", "", text, flags=re.MULTILINE)
    assert not re.findall(r"\bmend(?:s|ed|ing)?\b|\brefus(?:e|es|ed)\b|\breckon", text)


# ---- code ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["README.md", "docs/serving.md"])
def test_the_python_code_of_a_page_runs_as_printed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the demo model, since a checkpoint exists only after a run."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        code = re.sub(r"artifacts/(?:release|checkpoints)/(?:small|w4g128)", "demo/model", block)
        names: dict[str, Any] = {}
        exec(compile(code, name, "exec"), names)
        if "scores" in names:
            assert names["scores"].shape[1] == 1


def test_the_report_on_deepstack_is_short_and_true() -> None:
    """Its code is the file beside it, and prints what the report says: wrong on visual tokens alone."""
    folder = ROOT / "docs/upstream"
    script, report = folder / "autoround_deepstack.py", folder / "autoround-deepstack.md"
    code, output = re.findall(r"```(?:python)?\n(.*?)```", report.read_text(), re.DOTALL)
    assert code == script.read_text()
    assert len(code.splitlines()) <= 30
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    number = r"(text|visual) tokens: relative error (\d\.\d+)"
    printed, told = (dict(re.findall(number, text)) for text in (done.stdout, output))
    assert float(printed["text"]) == float(told["text"]) == 0
    assert float(printed["visual"]) == pytest.approx(float(told["visual"]), abs=0.01)
    assert float(told["visual"]) > 0.5


@pytest.mark.parametrize("report", [path for path in REPORTS if "autoround" not in path.name])
def test_the_code_of_a_report_is_the_file_beside_it(report: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", report.read_text(), re.DOTALL)
    assert code == report.with_name(report.stem.replace("-", "_") + ".py").read_text()


def test_the_report_on_mteb_is_true() -> None:
    pytest.importorskip("mteb")
    folder = ROOT / "docs/upstream"
    script = folder / "mteb_colqwen3_device.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    told = re.findall(r"^TypeError: .*$", (folder / "mteb-colqwen3-device.md").read_text(), re.M)
    assert told == done.stderr.strip().splitlines()[-1:]


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    """Return the example notebook."""
    content: dict[str, Any] = json.loads((ROOT / "docs/example.ipynb").read_text())
    return content


def test_the_notebook_runs(
    notebook: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Cell by cell, from another folder of the repository, on whatever model is there."""
    monkeypatch.chdir(ROOT / "docs")
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["recall_at_1"] > 0.8  # chance is 1 in 12
    assert names["same_first"] > 0.8
    assert names["heat_map"].format == "PNG"
    assert "page loss" in capsys.readouterr().out


def test_the_notebook_is_stored_without_outputs(notebook: dict[str, Any]) -> None:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


# ---- files around --------------------------------------------------------------------------------
def test_the_dockerfile_copies_what_exists_and_runs_the_two_commands() -> None:
    text = (ROOT / "Dockerfile").read_text()
    lines = re.sub(r"\\\n", " ", text).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert steps[0] == ["FROM", f"python:{required.removeprefix('>=')}-slim"]
    for instruction, rest in steps:
        assert instruction in {"FROM", "RUN", "WORKDIR", "USER", "ENV", "COPY", "CMD"}
        if instruction == "COPY":
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources)
    assert json.loads(steps[-1][1]) == ["make", "repro"]
    assert ["RUN", "make setup"] in steps
    assert "make test" in text  # in its head
    assert "git make" in next(rest for instruction, rest in steps if instruction == "RUN")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "artifacts"} <= set(ignored)
    assert not {".git", "tests", "demo", "docs", "metrics"} & set(ignored)


def test_the_workflow_runs_ci_on_the_oldest_python() -> None:
    workflow = read_yaml(ROOT / ".github/workflows/ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in [step.get("run") for step in steps]
    versions = {
        step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})
    }
    assert versions == {"3.11"}
    assert workflow["permissions"] == {"contents": "read"}
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


def test_the_citation_agrees_with_the_package() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]
    assert citation["authors"]
    assert citation["title"]
    assert shutil.which("git")
