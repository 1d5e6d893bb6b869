"""A disk that is really full: one line, nothing half-made is taken for whole, and then it goes on."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.command import fork_stage
from tests.helpers.work import make_work, results

# how many bytes are left free: too few in each case, for what is written or for what is asked for
STAGES = {
    "inspect_model": 0,
    "calibrate": 20_000,
    "allocate": 0,
    "quantize rtn": 20_000,
    "embed original": 20_000,
}


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A working folder whose artifacts/ is a disk of eight megabytes."""
    folder = make_work(tmp_path / "work")
    disk = folder / "artifacts"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"needs to mount a small disk, and there is no mount ({error})")
    if done.returncode:
        pytest.skip(f"needs to mount a small disk, and may not ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, spare: int) -> Path:
    """Fill a disk but for so many bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - spare))
    return ballast


def test_a_full_disk_is_one_line_and_then_it_goes_on(work: Path) -> None:
    for stage, spare in STAGES.items():
        before = results(work)
        ballast = fill(work / "artifacts", spare)
        done = fork_stage(work, stage.split())
        assert done.code == 1, done.err
        assert len(done.errors) == 1
        assert "free some space" in done.errors[0]
        assert "Traceback" not in done.err
        assert results(work) == before
        ballast.unlink()
        again = fork_stage(work, stage.split())
        assert again.code == 0, again.err
        expected = results(work)
        assert expected.keys() > before.keys()
        fill(work / "artifacts", spare)
        assert fork_stage(work, stage.split()).code == 1  # and a result that is there, stays
        assert results(work) == expected
        ballast.unlink()
