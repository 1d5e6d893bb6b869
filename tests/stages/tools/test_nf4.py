"""NF4 is an optional extra: without its library it says so in one line."""

import importlib.util
from pathlib import Path

import pytest
import torch

from colqwen3.system.errors import UserError
from stages.tools.nf4 import load_nf4

GOLDEN = Path("tests/golden/model")
CPU = torch.device("cpu")
THERE = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(THERE, reason="bitsandbytes is installed")
def test_a_missing_library_is_one_line() -> None:
    with pytest.raises(UserError, match="bitsandbytes is not installed; install it"):
        load_nf4(GOLDEN, torch.float32, CPU)


@pytest.mark.skipif(not THERE, reason="bitsandbytes is not installed")
def test_only_the_language_model_is_in_nf4() -> None:
    model = load_nf4(GOLDEN, torch.float32, CPU)
    quantized = {
        name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"
    }
    text = "vlm.model.language_model.layers"
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(text)
    }
    assert quantized == linear
    assert all(name.startswith(text) for name in quantized)
