"""What a reader says when it refuses its input."""

from collections.abc import Callable

import pytest

from colqwen3.system.errors import UserError


def refusal(reader: Callable[..., object], *args: object) -> str:
    """Return the one line with which `reader` refuses `args`."""
    with pytest.raises(UserError) as caught:
        reader(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)
