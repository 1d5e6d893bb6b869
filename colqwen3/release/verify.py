"""Whether a released folder is, byte for byte, what its metadata say.

This detects damage, and tampering by anyone who does not also write new metadata. For more, compare
the digest of the metadata with a trusted one.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from colqwen3.checkpoint.headers import read_headers
from colqwen3.release.provenance import METADATA, digest_weights, is_sealed, parse
from colqwen3.system.errors import UserError
from colqwen3.system.files import digest_file

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
# what Git, the Hub and its downloader add; none of it is loaded
ADDED = (".git", ".gitattributes", ".cache")


def read_metadata(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata of a released folder, and what is wrong with their own bytes.

    Raises
    ------
    UserError
        If they are missing, or too damaged to compare anything with.
    """
    path = folder / METADATA
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise UserError(
            f"{path}: cannot be read ({reason}); give a folder that this pipeline released"
        ) from None
    metadata = parse(text)
    valid = isinstance(metadata, dict) and all(
        isinstance(metadata.get(key), dict)
        and all(isinstance(entry, dict) for entry in metadata[key].values())
        for key in ("files", "tensors")
    )
    if not valid:
        raise UserError(f"{path}: is damaged; fetch it again")
    return metadata, [] if is_sealed(text, metadata) else [f"{METADATA}: changed"]


def find_changes(folder: Path, metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for every file of a folder that is not what its metadata say.

    Of a changed safetensors file every changed tensor is named.
    """
    there = {path.name: path for path in sorted(folder.iterdir()) if path.name not in ADDED}
    there.pop(METADATA, None)
    for name in sorted(metadata["files"].keys() | there.keys()):
        if name not in there:
            yield f"{name}: missing"
        elif problem := _forbidden(folder, there[name]):
            yield f"{name}: {problem}"
        elif name not in metadata["files"]:
            yield f"{name}: is not listed in {METADATA}"
        else:
            yield from _compare(there[name], metadata["files"][name], metadata["tensors"])


def _compare(path: Path, entry: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[str]:
    if path.suffix != ".safetensors":
        if digest_file(path) != entry.get("sha256"):
            yield f"{path.name}: changed"
        return
    try:
        digest, actual = digest_weights(path)
    except UserError as error:
        yield f"{path.name}: changed ({str(error).removeprefix(f'{path}: ')})"
        return
    if digest == entry.get("sha256"):
        return
    listed = {name for name, tensor in tensors.items() if tensor.get("file") == path.name}
    changed = [
        name
        for name in sorted(listed | actual.keys())
        if name not in listed or actual.get(name) != tensors[name].get("sha256")
    ]
    yield from (f"{path.name}: tensor {name} changed" for name in changed)
    if not changed:
        yield f"{path.name}: header changed"


def _forbidden(folder: Path, path: Path) -> str | None:
    """Say why a file may not be in a released folder at all, None if it may."""
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # the Hub's cache links its snapshots to ../../blobs
        homes.append(home.parent.parent / "blobs")
    if path.resolve().parent not in homes:
        return "points outside the folder"
    if not path.is_file():
        return "is not a file"
    with path.open("rb") as file:
        start = b"" if path.suffix == ".safetensors" else file.read(4)  # that one's header is read
    if path.suffix in PICKLED or start == b"PK\x03\x04" or start[:1] == b"\x80":
        return "may hold pickled objects, which run code when they are read"
    return None


def verify(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata of a released folder, and a line for everything that differs from them.

    Raises
    ------
    UserError
        If the metadata are missing or too damaged to compare anything with.
    """
    metadata, problems = read_metadata(folder)
    problems += find_changes(folder, metadata)
    if not problems and not any(name.endswith(".gguf") for name in metadata["files"]):
        read_headers(folder)  # the index names these files and no other
    return metadata, problems
