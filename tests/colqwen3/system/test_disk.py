"""The disk check against a disk whose free bytes are known."""

import logging
import shutil
from pathlib import Path

import pytest

from colqwen3.system.disk import check_space
from colqwen3.system.errors import UserError, disk_is_full


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Make every disk one of 1000 free bytes, and return the folders that were asked about."""
    folders: list[Path] = []

    def usage(path: Path) -> object:
        folders.append(path)
        return shutil._ntuple_diskusage(5000, 4000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return folders


def test_too_little_is_refused_in_a_line_with_folder_needed_and_free(asked: list[Path]) -> None:
    with pytest.raises(UserError) as caught:
        check_space(Path("artifacts/x"), 1001, "the checkpoint")
    assert disk_is_full(caught.value)  # so no fallback is tried for it
    assert str(caught.value) == (
        "artifacts/x: needs 1001 bytes for the checkpoint, 1000 bytes are free; "
        "free some space there, or mount a larger disk (see docs/troubleshooting.md)"
    )


def test_just_enough_is_enough_and_logged(
    asked: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_space(Path("artifacts/x"), 1000, "the checkpoint")
    assert "the checkpoint: needs 1e-06 GB, 1e-06 GB free" in caplog.text


def test_the_disk_of_the_nearest_folder_that_exists_is_asked(
    asked: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_space(tmp_path / "a" / "b", 1, "it")
    check_space(tmp_path, 1, "it")
    monkeypatch.chdir(tmp_path)
    check_space(Path("relative/one"), 1, "it")
    assert asked == [tmp_path, tmp_path, tmp_path]


def test_the_real_disk_is_read(tmp_path: Path) -> None:
    check_space(tmp_path, 1, "it")
    with pytest.raises(UserError, match="are free"):
        check_space(tmp_path, 10**18, "it")
