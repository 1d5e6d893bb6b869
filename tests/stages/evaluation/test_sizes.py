import json
from pathlib import Path
from typing import Any

import pytest

from colqwen3.system.errors import UserError
from stages.evaluation.sizes import MODEL_KEYS, PARTS, compare_sizes, read_bytes

MODEL: dict[str, Any] = {
    "files_bytes": 900,
    "components": {
        name: {"bytes": 100 + place} for place, name in enumerate(PARTS) if name != "files"
    },
}


def test_each_part_is_read_from_its_own_key(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(MODEL))
    sizes = read_bytes(path, MODEL_KEYS, "run it")
    assert sizes.pop("files") == 900
    assert sizes == {name: part["bytes"] for name, part in MODEL["components"].items()}


@pytest.mark.parametrize("value", [None, "900", 0, -1, 1.5])
def test_what_is_no_number_of_bytes_is_one_line(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**MODEL, "files_bytes": value}))
    with pytest.raises(UserError, match=r"model\.json: files_bytes is .*, no number.*; run it"):
        read_bytes(path, MODEL_KEYS, "run it")


def test_ratio_and_reduction_are_of_the_original() -> None:
    sizes = compare_sizes(dict.fromkeys(PARTS, 1000), dict.fromkeys(PARTS, 250))
    assert sizes["vision"] == {
        "original": 1000, "quantized": 250, "ratio": 4, "reduction_percent": 75,
    }  # fmt: skip
    assert sizes.keys() == set(PARTS)
