"""`colqwen3 verify` prints the digest of a folder that is as released, and every problem of another."""

import json
import shutil
from pathlib import Path

import pytest

from colqwen3.release.provenance import METADATA, SELF_DIGEST
from colqwen3.system.errors import run
from tests.helpers.cli import execute


@pytest.fixture
def folder(released: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "released"))


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute("verify", folder)
    said = capsys.readouterr().out
    assert json.loads((folder / METADATA).read_text())[SELF_DIGEST] in said
    config = folder / "config.json"
    config.chmod(0o644)
    config.write_text(config.read_text().replace("{", "{ ", 1))
    with pytest.raises(SystemExit) as ended:
        run(lambda: execute("verify", folder))
    assert ended.value.code == 1
    problem, fix = capsys.readouterr().err.splitlines()
    assert problem == f"error: {folder}/config.json: changed"
    assert fix.endswith("fetch it or release it again")
    for damage in (b"\xff", b"{", b'{"files": [], "tensors": {}}'):
        (folder / METADATA).write_bytes(damage)
        with pytest.raises(SystemExit):
            run(lambda: execute("verify", folder))
        assert capsys.readouterr().err.startswith(f"error: {folder}/{METADATA}: ")


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(lambda: execute("verify", tmp_path / "no"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be read" in line
