"""What the checks of engines share: environments, inputs, folders in every format, the table.

An engine runs in an environment of its own, from which nothing of this project can be imported
unless its plugin was installed there on purpose.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from colqwen3.embedding.batches import embed
from colqwen3.model.loading import load_model, load_processor
from colqwen3.release.projection import write_released
from stages.publishing.engines import ship_for_engines
from stages.publishing.model_code import ship_code, ship_sentence_transformers
from tests.helpers.clone import change

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements")
METRICS = ROOT / "metrics" / "engines"
ORIGINAL = ROOT / "demo" / "model"
GOLDEN = ROOT / "tests" / "golden" / "inputs"
DATASET = ROOT / "demo" / "pages" / "evaluation"
FORMATS = ("auto_round", "auto_gptq", "llm_compressor")
OF = "demo model (5.8 million parameters), CPU"
UNEVEN = "report_850x1100_rgb"
"""The golden page that is shrunk in one direction and enlarged in the other, where engines that resize with
torchvision differ from Pillow by up to 23 grey levels."""

Vectors = dict[str, torch.Tensor]


def check_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a check, with the options that all have."""
    parser = argparse.ArgumentParser(
        prog=f"PYTHONPATH=. python tests/slow/{name}.py", description=description
    )
    parser.add_argument("--recipe", default="w4g128")
    parser.add_argument("--environments", type=Path, help="keep them here, and use what is there")
    return parser


@contextmanager
def begin(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Namespace, Path, Path]]:
    """Yield a check's options, the checkpoint of its recipe, and a folder that goes with the context."""
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        yield args, ROOT / "artifacts" / "checkpoints" / args.recipe, Path(temporary)


def pip(python: Path, *arguments: str | Path) -> None:
    """Install into an environment, which sees no package of this one's."""
    command = [str(python), "-m", "pip", "install", "--quiet", *map(str, arguments)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd=python.parent, env=env)


def copied_project(folder: Path) -> Path:
    """Copy what the wheel is built of, since a build leaves files beside it."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "colqwen3", folder / "colqwen3", ignore=without)
    return folder


def environment(folder: Path, *arguments: str | Path) -> Path:
    """Return the interpreter of an environment into which pip installed what `arguments` name.

    An environment that is there, of the same arguments and files, is used as it is.
    """
    python, complete = folder.absolute() / "bin" / "python", folder / "complete"
    files = [Path(each).read_text() for each in arguments if str(each).endswith(".txt")]
    expected = repr([*map(str, arguments), *files])
    if not complete.exists() or complete.read_text() != expected:
        venv.create(folder, clear=True, with_pip=True)
        pip(python, *arguments)
        complete.write_text(expected)
    return python


def pinned(requirements: Path) -> dict[str, str]:
    """Return the versions that a requirements file pins, by package."""
    lines = (line.partition("==") for line in requirements.read_text().splitlines())
    return {
        name.partition("[")[0]: version.lstrip("=")
        for name, equals, version in lines
        if equals and not name.startswith("#")
    }


def outside(work: Path, **more: str) -> dict[str, str]:
    """Return the environment variables of a process that knows nothing of this project."""
    kept = ("PATH", "HOME", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    env = {key: value for key, value in os.environ.items() if key in kept}
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**env, **offline, **more}


def probe(python: Path, name: str, work: Path, *arguments: str | Path, **more: str) -> str | None:
    """Run a probe of tests/helpers; return None, or the last line that says why it failed."""
    path = python.parent.as_posix() + os.pathsep + os.environ["PATH"]
    command = [str(python), "-P", str(ROOT / "tests" / "helpers" / name), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=work, env=outside(work, PATH=path, **more), capture_output=True, text=True,
        timeout=1200, check=False,
    )  # fmt: skip
    (work / "log.out").write_text(done.stdout)
    (work / "log.txt").write_text(done.stdout + done.stderr)
    return why(done.stdout + done.stderr) if done.returncode else None


def why(log: str) -> str:
    """Return the first error of a log, in one line."""
    kinds = "AssertionError: ", "ValueError: ", "FileNotFoundError: ", "RuntimeError: ", "Error: "
    for kind in kinds:
        lines = [line[line.index(kind) :] for line in log.splitlines() if kind in line]
        if lines:
            return lines[0].strip()[:200]
    return log.strip().splitlines()[-1][:200] if log.strip() else "no output"


# ---- Folders and inputs -------------------------------------------------------------------------


def make_inputs(folder: Path, queries: int = 27, pages: int = 8) -> Path:
    """Write golden and demo queries and pages, those of the demo as PNG; `UNEVEN` is among them."""
    (folder / "pages").mkdir(parents=True)
    texts = json.loads((GOLDEN / "queries.json").read_text(encoding="utf-8"))
    for line in (DATASET / "queries.jsonl").read_text(encoding="utf-8").splitlines()[:queries]:
        row = json.loads(line)
        texts[row["_id"]] = row["text"]
    (folder / "queries.json").write_text(json.dumps(texts), encoding="utf-8")
    for path in sorted((GOLDEN / "pages").iterdir()):
        shutil.copyfile(path, folder / "pages" / path.name)
    for path in sorted((DATASET / "corpus").iterdir())[:pages]:
        Image.open(path).convert("RGB").save(folder / "pages" / f"{path.stem}.png")
    return folder


def release_as(kind: str, recipe: str, work: Path) -> Path:
    """Let the stage `release` publish a recipe in a format, in a copy of what it reads."""
    root = work / kind
    for name in (
        f"artifacts/checkpoints/{recipe}", "artifacts/manifest.json", f"artifacts/gate/{recipe}.json",
        "metrics/model.json", f"metrics/quality/{recipe}.json", f"metrics/quantize/{recipe}.json",
        "params.yaml", "demo/model",
    ):  # fmt: skip
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / name)
    (root / "params.yaml").unlink()
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    change(root, "release", value={recipe: {"format": kind}})
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.release", recipe]
    done = subprocess.run(command, cwd=root, env=env, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return root / "artifacts" / "release" / recipe


def original_as_released(folder: Path) -> Path:
    """Lay the original demo model out as a released folder."""
    folder.mkdir()
    for path in ORIGINAL.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    write_released(ORIGINAL, folder)
    ship_code(folder)
    ship_sentence_transformers(folder)
    ship_for_engines(folder, 1280)
    return folder


def changed(folder: Path, target: Path, bias: str) -> Path:
    """Copy a released folder with its bias ``removed``, or in a file ``before`` or ``after`` the rest."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    name = "embedding_proj_layer.before_weight.bias"
    moved = {name: tensors.pop(name)}
    if bias == "removed":
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return target
    (target / "model.safetensors").unlink()
    parts = (moved, tensors) if bias == "before" else (tensors, moved)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, target / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def limited(folder: Path, target: Path, limit: int) -> Path:
    """Copy a released folder with another limit of visual tokens."""
    shutil.copytree(folder, target)
    ship_for_engines(target, limit)
    return target


def reference(folder: Path, inputs: Path, dtype: torch.dtype, limit: int = 1280) -> Vectors:
    """Return what this project's loader gives for the inputs, with dense weights, on the CPU."""
    model = load_model(folder, dtype, torch.device("cpu"))
    processor = load_processor(folder, limit)
    queries = json.loads((inputs / "queries.json").read_text(encoding="utf-8"))
    result = {f"query/{key}": processor.process_texts([text]) for key, text in queries.items()}
    for path in sorted((inputs / "pages").glob("*.png")):
        result[f"page/{path.stem}"] = processor.process_images([Image.open(path)])
    return {key: embed(model, each)[0] for key, each in result.items()}


# ---- The table ----------------------------------------------------------------------------------


def compare(actual: Mapping[str, torch.Tensor], expected: Vectors) -> dict[str, Any]:
    """Return minimum and mean loss of cosines of tokens, queries and pages apart.

    Raises
    ------
    RuntimeError
        If an item is missing, or has another number of tokens.
    """
    parts: dict[str, list[torch.Tensor]] = {"query": [], "page": [], "page_resized_unevenly": []}
    for key, vectors in expected.items():
        if key not in actual or actual[key].shape != vectors.shape:
            shape = list(actual[key].shape) if key in actual else None
            raise RuntimeError(f"{key}: has shape {shape}, expected {list(vectors.shape)}")
        kind = "page_resized_unevenly" if key.endswith(UNEVEN) else key.partition("/")[0]
        cosines = torch.cosine_similarity(actual[key].double(), vectors.double(), dim=-1)
        parts[kind].append(cosines)
    row: dict[str, Any] = {"tokens": sum(len(vectors) for vectors in expected.values())}
    for kind, pieces in parts.items():
        if pieces:
            joined = torch.cat(pieces)
            row[f"{kind}_minimum"] = round(float(joined.min()), 6)
            row[f"{kind}_loss"] = round(1 - float(joined.mean()), 7)
    return row


def write_table(
    name: str, versions: Mapping[str, str], rows: list[dict[str, Any]], **more: Any
) -> Path:
    """Write metrics/engines/<name>.json; return its path."""
    METRICS.mkdir(parents=True, exist_ok=True)
    table = {
        "of": OF,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": platform.machine(),
        "versions": dict(versions),
        **more,
        "rows": rows,
    }
    path = METRICS / f"{name}.json"
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return path
