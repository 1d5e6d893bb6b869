"""Writing results so that a half-written file is never taken for a whole one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from stages.errors import PipelineError


def dump_json(value: Any) -> str:
    """Return `value` as sorted, indented JSON of finite numbers.

    Raises
    ------
    ValueError
        If a number is NaN or infinite: such JSON is invalid and shows in every diff.
    """
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write what `dump_json` makes of `value`, by rename."""
    write_file(path, dump_json(value).encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file by rename; what fails leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise


def read_json(path: Path, mend: str) -> Any:
    """Read a JSON file; `mend` says in the error what to do when it is missing or damaged.

    Raises
    ------
    PipelineError
        If the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}); {mend}") from None
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path}: is not valid JSON ({error}); {mend}") from None


def fresh_folder(path: Path) -> Path:
    """Return an empty sibling of `path` to write into; `publish_folder` moves it into place."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish_folder(partial: Path, path: Path) -> None:
    """Replace folder `path` by `partial`, which lies on the same disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, path)
