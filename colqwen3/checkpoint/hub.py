"""Finding the folder of a model, on this disk or on the Hub."""

import difflib
import re
from pathlib import Path

from colqwen3.system.errors import UserError, first_line
from colqwen3.system.files import expand_user, path_is

PATTERNS = (
    "*.json", "*.txt", "*.jinja", "*.safetensors", "LICEN[SC]E*", "NOTICE*", "README.md",
)  # fmt: skip


def find_model(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """Return the folder of a model: `source` itself, or its snapshot from the Hub.

    Only JSON, text and safetensors files are fetched, and Python files when the user trusts them.
    ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` are honoured by huggingface_hub.

    Raises
    ------
    UserError
        If `source` is neither a folder nor a Hub id whose files can be fetched, or a folder is given
        with a revision.
    """
    folder = expand_user(source)
    if source and path_is(folder, Path.is_dir):
        if revision is not None:
            raise UserError(
                f"{source}: is a folder, and only a Hub id has revisions; leave --revision out (in "
                "params.yaml set model.revision to null)"
            )
        return folder
    near = similar_folder(folder)
    problem = "no such folder" + (f" (did you mean {near}?)" if near else "")
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", source) or ".." in source:
        raise UserError(f"{source}: {problem}; give a model folder or a Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*PATTERNS, "*.py"] if trust_remote_code else list(PATTERNS)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{source}{at}: {problem}, and the Hub cannot provide it ({first_line(error)}); "
            "check the name (repositories move), the revision, the network and HF_TOKEN"
        ) from None


def similar_folder(folder: Path) -> Path | None:
    """Return a folder that exists and has one name of its path otherwise, if there is one."""
    try:
        missing = next(part for part in (folder, *folder.parents) if part.parent.is_dir())
        beside = [path.name for path in missing.parent.iterdir() if path.is_dir()]
        for name in difflib.get_close_matches(missing.name, beside, 1, 0.7):
            near = missing.parent / name / folder.relative_to(missing)
            return near if near.is_dir() else None
    except OSError:  # names that are too long, folders that may not be read
        pass
    return None
