"""Unfinished work that survives a crash, for as long as nothing that determines it changes."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from colqwen3.system.errors import UserError
from colqwen3.system.files import digest_file, write_json
from colqwen3.system.lock import Lock

logger = logging.getLogger(__name__)

STATE = "state.json"


def work_key(determinants: Any) -> str:
    """Return the SHA-256 of a JSON value: everything that determines the result."""
    text = json.dumps(determinants, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def surroundings(code: str, device: torch.device, libraries: Iterable[str]) -> dict[str, Any]:
    """Return what determines a result besides its inputs.

    Parameters
    ----------
    code
        A digest of the code that computes it.
    device
        Where it runs; the name of a GPU and the abilities of a CPU count.
    libraries
        Names of distributions whose versions count.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "code": code,
        "versions": {library: version(library) for library in libraries},
        # not the number of threads: a resumed run may well have another, and it changes no bit but
        # in GPTQ, whose codes are then others
        "machine": [name, torch.backends.cpu.get_cpu_capability()],
    }


class Scratch:
    """A folder of unfinished work in steps, locked while it is used.

    What an earlier run left is used only under the same key and with the digests that it
    recorded; otherwise the folder is emptied. Use as a context manager.

    Parameters
    ----------
    folder
        Where the work lies; ``<folder>.lock`` beside it is the lock.
    key
        The `work_key` of everything that determines the result.

    Attributes
    ----------
    steps
        The record of each finished step, in order.
    files
        Name -> digest of the files that the next step needs.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self.steps: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}
        self._lock = Lock(folder.with_name(folder.name + ".lock"))

    def __enter__(self) -> "Scratch":
        if not self._lock.take():
            raise UserError(
                f"{self.folder}: process {self._lock.holder()} is working on it; "
                "wait for it or stop it"
            )
        try:
            self._read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            if self.folder.exists():
                logger.warning(
                    "%s is not used: damaged, or from other parameters, inputs, code, libraries or machine",
                    self.folder,
                )
            self._clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # without a folder there is nothing left to lock
        self._lock.release(delete=not self.folder.exists())

    def _read(self) -> None:
        state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        if state["key"] != self._key:
            raise ValueError("another key")
        for name, digest in state["files"].items():
            if digest_file(self.folder / name) != digest:
                raise ValueError(f"{name} is damaged")
        self.steps, self.files = list(state["steps"]), dict(state["files"])

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.steps, self.files = [], {}

    def forget(self, reason: str) -> None:
        """Start again at the first step; `reason` is for the log."""
        logger.warning("%s is not used: %s", self.folder, reason)
        self.steps = []
        self.record({})

    def record(self, files: dict[str, str], step: dict[str, Any] | None = None) -> None:
        """Record a finished step (a JSON object) and the files that the next needs; drop others.

        The files must be there already: a crash before this call repeats the step, one after it
        does not.
        """
        if step is not None:
            self.steps.append(step)
        dropped = self.files.keys() - files.keys()
        self.files = dict(files)
        write_json(
            self.folder / STATE, {"key": self._key, "steps": self.steps, "files": self.files}
        )
        for name in dropped:
            (self.folder / name).unlink(missing_ok=True)

    def bytes(self) -> int:
        """Return the bytes that the unfinished work takes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def remove(self) -> None:
        """Delete the finished work."""
        shutil.rmtree(self.folder)
