"""The section `sensitivity` of params.yaml."""

import pytest
from pydantic import ValidationError

from stages.budget.options import SensitivityParams

VALUES = {"calibration": "mixed", "pages": 8, "queries": 32, "group_size": 128}


def test_values_are_kept_and_impossible_ones_rejected() -> None:
    assert SensitivityParams.model_validate(VALUES).model_dump() == VALUES
    for key, value in {"pages": 0, "queries": -1, "group_size": 48, "calibration": 1}.items():
        with pytest.raises(ValidationError, match=key):
            SensitivityParams.model_validate({**VALUES, key: value})
