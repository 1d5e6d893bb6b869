"""Reading calibration samples back; what is written is tested with the stage that writes it."""

from pathlib import Path

import pytest

from colqwen3.system.errors import UserError
from colqwen3.system.files import write_json
from stages.quantization.samples import INDEX, read_samples


def test_damaged_samples_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json: cannot be read.*dvc repro -f calibrate"):
        read_samples(tmp_path)
    write_json(tmp_path / INDEX, {"samples": [{"kind": "query"}]})
    with pytest.raises(UserError, match="cannot be read"):
        read_samples(tmp_path)
