"""Stages run as commands, each in a process of its own."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# forked from a process that has the slow imports behind it; the stages themselves it has not seen
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["colqwen3.model.loading", "stages.quantization.tuning", "tests.helpers.command"]
)


@dataclass(frozen=True)
class Done:
    """Exit status and text of a finished command."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def run_stage(folder: Path, words: list[str]) -> Done:
    """Run ``python -m stages.<words>`` in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{words[0]}", *words[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def fork_stage(folder: Path, words: list[str]) -> Done:
    """Run a stage as `run_stage` does, seconds faster when it needs torch."""
    logs = folder.parent / f"{folder.name}.out", folder.parent / f"{folder.name}.err"
    process = _forks.Process(target=_as_main, args=(folder, words, logs))
    process.start()
    process.join(300)
    assert process.exitcode is not None, f"{words} takes more than 300 s"
    return Done(process.exitcode, *(log.read_text(errors="replace") for log in logs))


def _as_main(folder: Path, words: list[str], logs: tuple[Path, Path]) -> None:
    for descriptor, log in zip((1, 2), logs, strict=True):
        os.dup2(os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    os.chdir(folder)
    sys.argv = [f"stages.{words[0]}", *words[1:]]
    runpy.run_module(f"stages.{words[0]}", run_name="__main__", alter_sys=True)


def alive(pid: int) -> bool:
    """Whether a process works; a zombie that nobody waits for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
