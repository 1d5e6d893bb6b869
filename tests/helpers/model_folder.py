"""Parts of model folders: an index of shards, and the Hub's cache."""

import hashlib
import json
from pathlib import Path

from colqwen3.checkpoint.headers import INDEX


def write_index(home: Path, weight_map: object) -> None:
    """Write the index of a model folder."""
    (home / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def cache_layout(folder: Path, hub: Path) -> Path:
    """Move a model folder into a Hub cache, as huggingface_hub lays it out."""
    repo, revision = hub / "models--owner--name", "6" * 40
    snapshot = repo / "snapshots" / revision
    for part in (snapshot, repo / "blobs", repo / "refs"):
        part.mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for path in sorted(folder.iterdir()):
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(repo / "blobs" / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    return snapshot
