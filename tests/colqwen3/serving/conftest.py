"""What tests of the serving runtime share."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from colqwen3.inspection import inspect_folder
from tests.helpers.rounded import rounded

MODEL = Path("tests/golden/model")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the golden checkpoint, rounded."""
    linears = inspect_folder(MODEL)[0]["linears"]
    return rounded(MODEL, tmp_path_factory.mktemp("quantized"), *linears)


@pytest.fixture(scope="module", autouse=True)
def hummings_own_tiles() -> Iterator[Any]:
    """Have humming's own tiles of some numbers of tokens only: it compiles each for seconds.

    Gives what returns all of them; None without humming.
    """
    if find_spec("humming") is None:
        yield None
        return
    from humming import tune

    right, ends = tune.get_heuristics_config, (16, 128, 512, 4096, 1 << 30)

    def few(*args: Any, **options: Any) -> list[tuple[int, int, Any]]:
        own = [(beyond, up_to, tile) for beyond, up_to, tile in right(*args, **options)]
        tiles = [next(tile for beyond, up_to, tile in own if beyond < end <= up_to) for end in ends]
        return list(zip((0, *ends), ends, tiles, strict=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "get_heuristics_config", few)
        yield right
