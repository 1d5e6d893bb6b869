"""The choice of the device."""

from pathlib import Path

import pytest
import torch

from colqwen3.system.device import choose_device, memory_of
from colqwen3.system.errors import UserError


def test_cuda_without_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(
        UserError, match=r"the device is cuda, but torch sees no GPU; .*compute\.device.*--device"
    ):
        choose_device("cuda")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system tells it elsewhere")
def test_memory_of_a_cpu_is_what_the_system_says() -> None:
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in x)
    assert memory_of(torch.device("cpu")) == 1024 * int(line.split()[1])
