"""A copy of the repository in which the pipeline runs, and what its results are."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ruamel.yaml import YAML

TIMED = "artifacts/speed"  # wall times differ from run to run
NO_ENV: Mapping[str, str] = {}


def start_dvc(
    clone: Path, *args: str, log: IO[str] | int = subprocess.PIPE, env: Mapping[str, str] = NO_ENV
) -> subprocess.Popen[str]:
    """Start dvc in a clone; what it says goes to `log`."""
    # the interpreter that runs the tests must also run the stages
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *args],
        cwd=clone, env={**os.environ, "PATH": path, **env},
        stdout=log, stderr=log, text=True,
    )  # fmt: skip


def dvc(
    clone: Path, *args: str, env: Mapping[str, str] = NO_ENV
) -> subprocess.CompletedProcess[str]:
    """Run dvc in a clone."""
    process = start_dvc(clone, *args, env=env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def change(clone: Path, *keys: str, value: object) -> None:
    """Set a value of params.yaml."""
    yaml = YAML()
    params = yaml.load((clone / "params.yaml").read_text())
    section = params
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    with (clone / "params.yaml").open("w") as file:
        yaml.dump(params, file)


def keep_recipes(clone: Path, *names: str) -> None:
    """Take all recipes but these out of params.yaml, and the sets of samples that only others use."""
    yaml = YAML()
    params = yaml.load((clone / "params.yaml").read_text())
    recipes, sets = params["recipes"], params["calibration"]["sets"]
    for name in set(recipes) - set(names):
        del recipes[name]
    for name in set(sets) - {recipes[name]["calibration"] for name in names} - {"mixed"}:
        del sets[name]
    with (clone / "params.yaml").open("w") as file:
        yaml.dump(params, file)


def copy_tree(folder: Path) -> None:
    """Copy the working tree's files that Git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if Path(name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, folder / name)


WHEN = dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "2026-01-01T00:00:00Z")
"""Clones of one tree have one commit, which a release names."""


def commit(folder: Path) -> None:
    """Make a repository of a copied tree, without the results that came along."""
    (folder / "dvc.lock").unlink(missing_ok=True)
    for name in ("plots", "quality", "quantize", "queries", "summary"):
        shutil.rmtree(folder / "metrics" / name, ignore_errors=True)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "clone"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True, env=os.environ | WHEN)


def small_dataset(folder: Path, pages: int) -> None:
    """Keep the first pages of a dataset, and the queries that they answer."""
    remaining = {path.stem for path in sorted((folder / "corpus").iterdir())[:pages]}
    for path in (folder / "corpus").iterdir():
        if path.stem not in remaining:
            path.unlink()
    header, *rows = (folder / "qrels.tsv").read_text().splitlines()
    rows = [row for row in rows if row.split("\t")[1] in remaining]
    answered = {row.split("\t")[0] for row in rows}
    (folder / "qrels.tsv").write_text("\n".join([header, *rows]) + "\n")
    lines = (folder / "queries.jsonl").read_text().splitlines()
    lines = [line for line in lines if json.loads(line)["_id"] in answered]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")


def small_clone(folder: Path, pages: int = 8, iters: int = 10) -> Path:
    """Make a clone of two recipes in which the whole pipeline takes about a minute."""
    folder.mkdir(parents=True)
    copy_tree(folder)
    keep_recipes(folder, "w4g128", "rtn-w4g128")
    small_dataset(folder / "demo/pages/evaluation", pages)
    for keys, value in {
        ("calibration", "sets", "mixed", "queries"): 3,
        ("calibration", "sets", "mixed", "pages"): 3,
        ("recipes", "w4g128", "iters"): iters,
        ("recipes", "w4g128", "lr"): 0.005,
        ("recipes", "w4g128", "batch_size"): 1,
        ("benchmark", "warmup"): 0,
        ("benchmark", "repeats"): 1,
    }.items():
        change(folder, *keys, value=value)
    commit(folder)
    return folder


def results(clone: Path) -> dict[str, str]:
    """Return a digest of every file that must be the same in each run, and of dvc.lock."""
    actual = {}
    for root in ("artifacts", "metrics"):
        for path in sorted((clone / root).rglob("*")):
            name = str(path.relative_to(clone))
            if path.is_file() and not name.startswith(
                (TIMED, "artifacts/scratch", "artifacts/locks")
            ):
                actual[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    actual["dvc.lock"] = hashlib.sha256(sorted_lock(clone).encode()).hexdigest()
    return actual


def sorted_lock(clone: Path) -> str:
    """Return dvc.lock with its stages by name: DVC writes them in the order in which they ran."""
    lock: dict[str, Any] = YAML(typ="safe").load(clone / "dvc.lock")
    return json.dumps(lock, indent=1, sort_keys=True)


def differences(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Return the names of files that differ or are missing on one side."""
    return sorted(name for name in first | second if first.get(name) != second.get(name))


def processes_of(clone: Path) -> list[int]:
    """Return the processes whose working folder is the clone."""
    actual = []
    for entry in Path("/proc").glob("[0-9]*"):  # nothing on macOS
        try:
            if (entry / "cwd").readlink() == clone.resolve():
                actual.append(int(entry.name))
        except OSError:
            continue  # it has ended, or is another user's
    return actual


def left_behind(clone: Path, seconds: float = 60) -> list[str]:
    """Give the processes of a killed run time to end; return the commands that still run."""
    until = time.monotonic() + seconds
    while (running := processes_of(clone)) and time.monotonic() < until:
        time.sleep(0.2)
    commands = []
    for process in running:
        with contextlib.suppress(OSError):  # it ended just now
            commands.append(Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" "))
    return [command.decode() for command in commands]
