"""pyarrow's Parquet, an extra of the library."""

from typing import Any

from colqwen3.system.errors import UserError

PYARROW = "pyarrow>=21"


def parquet() -> Any:
    """Return `pyarrow.parquet`.

    Raises
    ------
    UserError
        If pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"pyarrow is not installed; run `pip install '{PYARROW}'`") from None
    return pyarrow.parquet
