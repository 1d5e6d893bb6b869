"""What tests of the serving runtime share."""

from pathlib import Path

import pytest

from colqwen3.inspection import inspect_folder
from tests.helpers.rounded import rounded

MODEL = Path("tests/golden/model")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the golden checkpoint, rounded."""
    linears = inspect_folder(MODEL)[0]["linears"]
    return rounded(MODEL, tmp_path_factory.mktemp("quantized"), *linears)
