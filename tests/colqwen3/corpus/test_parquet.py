"""pyarrow is an extra: without it, one line says what to install."""

import sys

import pyarrow.parquet
import pytest

from colqwen3.corpus.parquet import parquet
from colqwen3.system.errors import UserError


def test_parquet_is_that_of_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parquet() is pyarrow.parquet
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"^pyarrow is not installed; run `pip install 'pyarrow>="):
        parquet()
