"""Show what an upload of a released folder would send, and the command that sends it.

`python -m stages.tools.upload FOLDER OWNER/NAME` verifies the folder, lists its files and sizes, and
prints the command of huggingface_hub that uploads them. Nothing is sent, and no token is read: that
command takes it from ``HF_TOKEN`` or from ``hf auth login``.
"""

import argparse
import shlex
import sys
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from colqwen3.release.provenance import METADATA
from colqwen3.release.verify import verify
from colqwen3.system.errors import UserError, run
from stages.evaluation.limits import WORSE


def list_files(folder: Path, names: list[str]) -> list[str]:
    """Return one line per file, size first and the largest on top, and one with their sum."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    ordered = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    width = len(f"{sum(sizes.values()):,}")
    lines = [f"{size:>{width},}  {name}" for name, size in ordered]
    return [*lines, f"{sum(sizes.values()):>{width},}  bytes in {len(sizes)} files"]


def upload_command(folder: Path, repo: str, names: list[str]) -> str:
    """Return the command that uploads exactly these files, as a private repository at first.

    Raises
    ------
    UserError
        If `repo` is no name of a repository.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo_is_valid = False
    else:
        repo_is_valid = repo.count("/") == 1
    if not repo_is_valid:
        raise UserError(f"{repo}: is no name of a repository on the Hub; give OWNER/NAME")
    command = ["hf", "upload", repo, str(folder), ".", "--private"]
    for name in names:
        command += ["--include", name]
    return shlex.join(command)


def main() -> None:
    """List what would be uploaded; fail if the folder is not as it was released."""
    parser = argparse.ArgumentParser(prog="python -m stages.tools.upload", description=__doc__)
    parser.add_argument("folder", type=Path, help="a released folder")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub")
    args = parser.parse_args()
    metadata, problems = verify(args.folder)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{args.folder}/{problems[0]}{more}; release it again")
    names = sorted([*metadata["files"], METADATA])
    command = upload_command(args.folder, args.repo, names)
    print("\n".join(list_files(args.folder, names)))
    if metadata.get("verdict", {}).get("verdict") == WORSE:
        print(
            f"warning: FAILED: {metadata['verdict']['reason']}; this recipe broke a limit of the "
            "gate, as its card says: upload it only if others are meant to see that",
            file=sys.stderr,
        )
    if metadata["pipeline"]["commit"] is None or metadata["pipeline"]["dirty"]:
        print(
            "warning: released by code or parameters that are in no commit; commit them and run "
            f"`dvc repro -f -s release@{metadata['recipe']['name']}` before others depend on it",
            file=sys.stderr,
        )
    print(f"\nNothing was uploaded. This uploads it:\n\n    {command}")


if __name__ == "__main__":
    run(main)
