"""The dry run of an upload: lists what the folder holds, sends nothing, knows no token."""

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from colqwen3.system.errors import UserError, run
from stages.tools import upload
from stages.tools.upload import upload_command

DryRun = Callable[..., str]
TOKEN = "hf_" + "secret" * 5


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> DryRun:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def call(folder: Path, repo: str = "owner/name") -> str:
        monkeypatch.setattr(sys, "argv", ["upload", str(folder), repo])
        run(upload.main)
        both = capfd.readouterr()
        assert TOKEN not in both.out + both.err
        return str(both.out)

    return call


def test_lists_every_file_and_the_sum(released: Path, dry_run: DryRun) -> None:
    said = dry_run(released)
    sizes = {path.name: path.stat().st_size for path in released.iterdir()}
    for name, size in sizes.items():
        assert f"{size:,}  {name}\n" in said
    assert f"{sum(sizes.values()):,}  bytes in {len(sizes)} files" in said
    command = shlex.split(said.strip().splitlines()[-1])
    assert command[:5] == ["hf", "upload", "owner/name", str(released), "."]
    assert set(command[7::2]) == sizes.keys()


def test_a_changed_folder_is_refused(released: Path, tmp_path: Path, dry_run: DryRun) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "released"))
    (folder / "token.txt").write_text("left here by mistake")
    with pytest.raises(SystemExit):
        dry_run(folder)


@pytest.mark.parametrize("repo", ["name", "a/b/c", "../x", "a b/c", "--token/x y"])
def test_what_is_no_repository_is_refused(repo: str) -> None:
    with pytest.raises(UserError, match="no name of a repository"):
        upload_command(Path("x"), repo, [])
