"""The choice of the device."""

import pytest
import torch

from colqwen3.system.device import choose_device
from colqwen3.system.errors import UserError


def test_cuda_without_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(
        UserError, match=r"the device is cuda, but torch sees no GPU; .*compute\.device.*--device"
    ):
        choose_device("cuda")
