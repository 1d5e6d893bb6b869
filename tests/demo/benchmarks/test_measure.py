"""Measured memory against memory that is taken on purpose."""

import os
import sys
import time
from pathlib import Path

import pytest

from demo.benchmarks.measure import Usage, machine, run_measured

MEGABYTE = 1 << 20
HOLD = "import time; held = bytearray({size}); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.3)"


def python(code: str, log: Path, **options: object) -> Usage:
    return run_measured([sys.executable, "-c", code], log.parent, log, **options)  # type: ignore[arg-type]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_own_memory_is_what_was_taken(log: Path) -> None:
    usage = python(HOLD.format(size=200 * MEGABYTE), log)
    assert usage.status == 0
    assert 200 * MEGABYTE < usage.peak_own_bytes < 230 * MEGABYTE
    assert usage.peak_resident_bytes >= usage.peak_own_bytes
    assert usage.seconds > 0.3


def test_that_of_descendants_counts(log: Path) -> None:
    inner = HOLD.format(size=100 * MEGABYTE) + "; time.sleep(1)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {outer!r}])"
    usage = python(middle, log)
    assert 100 * MEGABYTE < usage.peak_own_bytes < 150 * MEGABYTE


def test_mapped_files_are_resident_but_not_own(log: Path, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(100 * MEGABYTE))
    code = (
        f"import mmap, time; f = open({str(path)!r}, 'rb');"
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096]); time.sleep(0.3)"
    )
    usage = python(code, log)
    assert usage.peak_own_bytes < 40 * MEGABYTE
    assert usage.peak_resident_bytes > 100 * MEGABYTE


def test_status_output_and_results_come_back(log: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; print('RESULT {\"a\": 1}'); print('RESULT {\"b\": [2]}');"
        "print(os.environ['WORD'], os.getcwd(), file=sys.stderr); sys.exit(3)"
    )
    usage = python(code, log, environment={"WORD": "given"})
    assert usage.status == 3
    assert usage.result == {"a": 1, "b": [2]}
    assert f"given {tmp_path}" in usage.output


def test_enough_is_enough(log: Path) -> None:
    start = time.monotonic()
    usage = python(
        "import time; time.sleep(600)", log, enough=lambda: time.monotonic() > start + 0.3
    )
    assert usage.status == -15


def test_the_machine_is_named() -> None:
    actual = machine(gpu=False)
    assert actual["cores"] == len(os.sched_getaffinity(0))
    assert actual["cpu"]
    assert actual["versions"]["torch"].startswith("2.")
    assert 1 < actual["ram_gb"] < 10_000
    assert "gpu" not in actual
    assert machine(gpu=True)["gpu"]
