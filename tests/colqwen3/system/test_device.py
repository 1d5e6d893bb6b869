"""The choice of the device."""

import os
from pathlib import Path

import pytest
import torch

from colqwen3.system import device
from colqwen3.system.device import choose_device, make_deterministic, memory_of
from colqwen3.system.errors import UserError


def test_deterministic_products_need_cublas_to_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda on, warn_only: asked.append(on)
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "restored after the test")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    make_deterministic()
    assert (asked, os.environ["CUBLAS_WORKSPACE_CONFIG"]) == ([True], ":4096:8")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "what the user has set stays"


def test_cuda_without_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(
        UserError, match=r"the device is cuda, but torch sees no GPU; .*compute\.device.*--device"
    ):
        choose_device("cuda")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system tells it elsewhere")
def test_memory_of_a_cpu_is_what_the_system_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "MEMBERSHIP", tmp_path / "none")
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in x)
    assert memory_of(torch.device("cpu")) == 1024 * int(line.split()[1])


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        # version 2, limited above its own folder, and as a container sees it that is told its host's path
        ("0::/a/b", {"memory.max": "max", "a/memory.max": "4096", "a/b/memory.max": "max"}, 4096),
        ("0::/a/b", {"a/memory.max": "4096", "a/b/memory.max": "2048"}, 2048),
        ("0::/docker/1f", {"memory.max": "8192"}, 8192),
        ("0::/", {"memory.max": "8192", "memory/memory.limit_in_bytes": "1"}, 8192),
        # version 1, alone, with another controller and beside version 2, whose folder has no limits
        ("4:memory:/x", {"memory/x/memory.limit_in_bytes": "2048", "x/memory.max": "1"}, 2048),
        ("3:cpu,memory:/x\n0::/", {"memory/memory.limit_in_bytes": "1024"}, 1024),
        # no limit
        ("0::/a", {"a/memory.max": "max"}, 10**6),
        ("0::/a", {"b/memory.max": "4096"}, 10**6),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 10**6),
        ("5:pids:/x", {"memory.max": "1", "x/memory.max": "1"}, 10**6),
    ],
)
def test_memory_of_a_cpu_is_within_the_limit_of_a_container(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    membership: str,
    files: dict[str, str],
    expected: int,
) -> None:
    root = tmp_path / "root"
    for name, limit in {**files, "../memory.max": "1"}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    (tmp_path / "membership").write_text(f"{membership}\n")
    monkeypatch.setattr(device, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(device, "CGROUPS", root)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert memory_of(torch.device("cpu")) == expected
