"""The library stands alone: its wheel, with its declared dependencies and nothing else, embeds a query."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from colqwen3.embedding.embedder import embed_all
from colqwen3.embedding.store import read_embeddings
from colqwen3.model.loading import load_model, load_processor

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
MODEL = Path("demo/model").absolute()
QUERY = "total of the invoice"
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
"""Import name -> name on the package index, where they differ."""
EXTRAS = {
    "mteb": "benchmarks", "humming": "gpu", "auto_round_kernel": "cpu", "gguf": "gguf",
    "pyarrow": "corpus", "sentence_transformers": "corpus", "ray": "ray", "streamlit": "search",
    "vllm": "vllm", "cuda": "gpu",
}  # fmt: skip
"""Import name -> extra of pyproject.toml."""
TRAVELS = Path("colqwen3/gguf/run_gguf.py")
"""Nothing of the library imports it: it runs by itself, beside the files that it reads."""
ALONE = (
    Path("colqwen3/search/page.py"),
    Path("colqwen3/vllm_plugin/model.py"),
    Path("colqwen3/serving/int8_kernels.py"),
    Path("colqwen3/serving/humming_gate.py"),
)
"""Streamlit runs the first, vLLM imports the second, and the library the others where they are used."""
WITH_TORCH = {"triton"}
"""What torch's CUDA builds bring along; used only on a GPU."""


# ---- What the library imports is declared -------------------------------------------------------


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the third-party packages that a file imports, and whether as soon as it is imported."""
    tree = ast.parse(path.read_text())
    at_once = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            root = name.split(".")[0]
            if root not in sys.stdlib_module_names and root != "colqwen3":
                yield root, id(node) in at_once


def test_everything_the_library_imports_is_declared_and_no_more() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    imported: set[str] = set()
    for path in Path("colqwen3").rglob("*.py"):
        for root, at_once in imports(path) if path != TRAVELS else ():
            name = canonicalize_name(DISTRIBUTIONS.get(root, root))
            if root in EXTRAS:
                assert not at_once or path in ALONE, (
                    f"{path}: {root} is an extra; import it where it is used"
                )
            elif root not in WITH_TORCH:
                assert name in declared, f"{path}: {root} is not declared in pyproject.toml"
                imported.add(name)
    assert imported == declared
    assert len(declared) <= 9
    assert set(EXTRAS.values()) <= PROJECT["optional-dependencies"].keys()


def test_the_program_beside_gguf_files_needs_three_packages_and_no_library() -> None:
    assert {root for root, _ in imports(TRAVELS)} == {"numpy", "PIL", "xllamacpp"}
    assert "colqwen3." not in re.sub(r'b?"colqwen3\.[\w.]+"', "", TRAVELS.read_text())
    assert not [
        path for path in Path("colqwen3").rglob("*.py") if "import run_gguf" in path.read_text()
    ]
    (pin,) = re.findall(r'^XLLAMACPP = "(.+?)"', TRAVELS.read_text(), re.MULTILINE)
    assert f"xllamacpp=={pin}" in PROJECT["optional-dependencies"]["gguf"]
    assert f"xllamacpp=={pin}" in Path("requirements.txt").read_text().splitlines()


def test_what_is_declared_is_what_the_tests_run_with() -> None:
    extras = PROJECT["optional-dependencies"]
    for text in [
        *PROJECT["dependencies"],
        *extras["pipeline"],
        *extras["benchmarks"],
        *extras["corpus"],
    ]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(distribution(requirement.name).version), text


# ---- The wheel ----------------------------------------------------------------------------------


def can_build() -> bool:
    """Whether the installed setuptools can build a wheel by itself, without a network."""
    try:
        return int(distribution("setuptools").version.split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, since a build leaves files beside them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(name, source / name)
    for name in ("colqwen3", "stages", "demo/studies", "tests/helpers"):  # only one may get in
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(name, source / name, ignore=without)
    out = tmp_path_factory.mktemp("wheel")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        out,
    ]
    if can_build():
        command.append("--no-build-isolation")
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if ".dist-info/" in name.split("/", 1)[0] + "/"}
    sources = {str(path) for path in Path("colqwen3").rglob("*.py")}
    kernels = {f"colqwen3/serving/{name}.cu" for name in ("int8", "humming_gate")}
    assert names - info == sources | kernels | {"colqwen3/py.typed"}
    assert any(name.endswith("LICENSE") for name in info)
    assert {name.split("/", 1)[0] for name in info} == {
        f"colqwen3_autoround-{PROJECT['version']}.dist-info"
    }


def required(
    name: str, actual: dict[str, Distribution], extras: frozenset[str] = frozenset()
) -> None:
    """Collect an installed distribution and all that it requires."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return  # only needed on another system
    known = canonicalize_name(name) in actual
    actual[canonicalize_name(name)] = package
    if known and not extras:
        return
    for text in package.requires or []:
        requirement = Requirement(text)
        environments = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            required(requirement.name, actual, frozenset(requirement.extras))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a virtual environment with the wheel and links to its dependencies, and nothing else."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin/python"
    install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    done = subprocess.run([*install, wheel], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = home.glob("lib/python*/site-packages")
    actual: dict[str, Distribution] = {}
    for text in PROJECT["dependencies"]:
        required(Requirement(text).name, actual)
    for package in actual.values():
        for file in package.files or []:
            top = file.parts[0]
            target = Path(str(package.locate_file(top)))
            link = packages / top
            if top not in ("..", "__pycache__") and target.exists() and not link.exists():
                link.symlink_to(target)
    return home


def run_in(environment: Path, folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [environment / "bin" / words[0], *words[1:]], cwd=folder,
        env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


EMBED = """
import importlib.util, json, sys
import colqwen3
assert colqwen3.__file__.startswith(sys.prefix), colqwen3.__file__
absent = ["stages", "demo", "tests", "auto_round", "dvc", "ruamel", "scipy", "mteb"]
importable = [name for name in absent if importlib.util.find_spec(name)]
assert not importable, importable
assert "torch" not in sys.modules
runtime = colqwen3.load_runtime(sys.argv[1], device="cpu", mode="eager")
query, = runtime.embed_queries([sys.argv[2]])
scores = colqwen3.max_sim([query], [query])
print(json.dumps({"vectors": query.tolist(), "score": float(scores)}))
"""


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Return the embedding of the query by the model class of the working tree."""
    model = load_model(MODEL, torch.float32, torch.device("cpu"))
    processor = load_processor(MODEL, 1280)
    return embed_all(model, processor, {"q": QUERY}, {}, 1, 1280)[0]["q"]


def test_the_installed_library_embeds_a_query(
    environment: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    done = run_in(environment, tmp_path, "python", "-c", EMBED, MODEL, QUERY)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    vectors = torch.tensor(answer["vectors"])
    assert torch.nn.functional.cosine_similarity(vectors, expected).min() > 0.999  # may be bfloat16
    assert answer["score"] == pytest.approx(len(vectors), rel=1e-2)  # each token meets itself


def test_the_installed_command_embeds_a_query(
    environment: Path, expected: torch.Tensor, tmp_path: Path
) -> None:
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": QUERY}))
    out = tmp_path / "out.safetensors"
    done = run_in(
        environment, tmp_path, "colqwen3", "embed",
        "--model", MODEL, "--queries", "queries.jsonl", "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(read_embeddings(out).queries["q"], expected, atol=1e-5, rtol=0)


def test_the_installed_command_says_what_to_install_for_benchmarks(
    environment: Path, tmp_path: Path
) -> None:
    words: list[str | Path] = [
        "benchmark-vidore",
        "--model",
        MODEL,
        "--tasks",
        "any",
        "--out",
        "o.json",
    ]
    done = run_in(environment, tmp_path, "colqwen3", *words)
    assert done.returncode == 1
    assert re.search(r"^error: mteb is not installed; run `pip install mteb==", done.stderr, re.M)
