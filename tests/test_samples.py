"""Reading calibration samples back; what is written is tested with the stage that writes it."""

from pathlib import Path

import pytest

from stages.errors import PipelineError
from stages.files import write_json
from stages.samples import INDEX, read_samples


def test_damaged_samples_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"index\.json: cannot be read.*dvc repro -f calibrate"):
        read_samples(tmp_path)
    write_json(tmp_path / INDEX, {"samples": [{"kind": "query"}]})
    with pytest.raises(PipelineError, match="cannot be read"):
        read_samples(tmp_path)
