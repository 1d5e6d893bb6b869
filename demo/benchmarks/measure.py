"""Time and memory of a program run as a child process, and the name of the machine it ran on."""

import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json

PROC = Path("/proc")
SAMPLE_SECONDS = 0.02
FAMILY_SECONDS = 0.5  # between looks for new descendants, which take longer
RESULT = "RESULT "
"""What a line of a child's stdout begins with that hands a JSON object to `run_measured`."""
LIBRARIES = ("torch", "transformers", "auto-round", "safetensors")


@dataclass(frozen=True)
class Usage:
    """What a child process took.

    Attributes
    ----------
    seconds
        Wall time from start to end.
    peak_own_bytes
        Peak anonymous memory of the child and its descendants together, sampled: what it really
        needs.
    peak_resident_bytes
        Peak resident memory, which counts mapped files: the system takes those back at need.
    status
        Exit status, negative for a signal.
    output
        Last lines of stdout and stderr together, ``RESULT`` lines left out.
    result
        The fields of the ``RESULT`` lines that it printed.
    """

    seconds: float
    peak_own_bytes: int
    peak_resident_bytes: int
    status: int
    output: str
    result: dict[str, Any]


class Sampler:
    """Reads the memory of a process and its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        self.own = self.resident = 0
        self._pid, self._family = pid, {pid}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        looked = 0.0
        while not self._stop.wait(SAMPLE_SECONDS):
            if time.monotonic() - looked > FAMILY_SECONDS:
                self._family, looked = descendants(self._pid), time.monotonic()
            sizes = [memory(pid) for pid in self._family]
            self.own = max(self.own, sum(item.get("RssAnon", 0) for item in sizes))
            self.resident = max(
                self.resident,
                sum(item.get("VmRSS", 0) for item in sizes),
                *(item.get("VmHWM", 0) for item in sizes),
            )


def memory(pid: int) -> dict[str, int]:
    """Return the memory fields of ``/proc/<pid>/status`` in bytes, none if it is gone."""
    try:
        text = (PROC / str(pid) / "status").read_text()
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


def descendants(pid: int) -> set[int]:
    """Return a process and all that it started, directly or not."""
    children: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            try:
                # the name, in brackets, may hold anything; state and parent follow
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    family, queue = set(), [pid]
    while queue:
        process = queue.pop()
        family.add(process)
        queue += children.get(process, [])
    return family


def run_measured(
    command: Sequence[str | Path],
    folder: Path,
    log: Path,
    environment: Mapping[str, str] | None = None,
    enough: Callable[[], bool] | None = None,
) -> Usage:
    """Run `command` in `folder` to its end and measure it.

    Parameters
    ----------
    command
        Program and arguments.
    folder
        Its working folder.
    log
        Where its stdout and stderr go.
    environment
        Variables beside those of this process.
    enough
        Asked ten times a second; once true, the child is ended with SIGTERM.
    """
    start = time.monotonic()
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        sampler = Sampler(child.pid)
        try:
            while enough and child.poll() is None:
                if enough():
                    child.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.1)
            status = child.wait()
        finally:
            child.kill()
            sampler.stop()
    seconds = time.monotonic() - start
    result: dict[str, Any] = {}
    others = []
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith(RESULT):
            result |= json.loads(line.removeprefix(RESULT))
        else:
            others.append(line)
    output = "\n".join(others[-20:])
    return Usage(seconds, sampler.own, sampler.resident, status, output, result)


def machine(gpu: bool) -> dict[str, Any]:
    """Return what results depend on: processor, cores, memory, GPU, and versions."""
    description: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in LIBRARIES},
    }
    if gpu:
        description["gpu"] = gpu_name()
    return description


def open_results(
    path: Path, made_of: Mapping[str, Any], holds: str, anew: bool = False
) -> dict[str, Any]:
    """Return earlier results to add to, or new ones if there are none or `anew`.

    Parameters
    ----------
    path
        A JSON file.
    made_of
        What all results of a file have in common, kept at its top: machine, size.
    holds
        Key of the results.
    anew
        Whether to leave earlier results out.

    Raises
    ------
    UserError
        If the file has something else in common.
    """
    if anew or not path.exists():
        return {**made_of, holds: {}}
    results: dict[str, Any] = read_json(path, "remove it")
    for key, value in made_of.items():
        if results.get(key) != value:
            raise UserError(
                f"{path}: was measured with another {key}; remove it or name another --out"
            )
    return results


def cpu_name() -> str:
    """Return the processor's model name."""
    for line in (PROC / "cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def gpu_name() -> str:
    """Return name and driver of the first GPU as ``nvidia-smi`` gives them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def installed(name: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
