"""Files that appear whole or not at all, and their digests."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from colqwen3.system.errors import UserError


def dump_json(value: Any) -> str:
    """Return `value` as sorted, indented JSON of finite numbers.

    Raises
    ------
    ValueError
        If a number is NaN or infinite: such JSON is invalid and shows in every diff.
    """
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as `dump_json` formats it, by rename."""
    write_file(path, dump_json(value).encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file by rename; a failure leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise


def read_json(path: Path, fix: str) -> Any:
    """Read a JSON file; `fix` tells in the error what to do if it is missing or damaged.

    Raises
    ------
    UserError
        If the file is missing or is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); {fix}") from None


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


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(root: Path, files: Iterable[Path]) -> str:
    """Return one SHA-256 over the names (relative to `root`) and bytes of files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\0{digest_file(path)}\n".encode())
    return digest.hexdigest()


def path_is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Return ``kind(path)``, False where the name itself is impossible."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def expand_user(path: str) -> Path:
    """Return a path with ``~`` expanded, and as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
