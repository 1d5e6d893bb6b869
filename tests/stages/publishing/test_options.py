import pytest
from pydantic import ValidationError

from stages.publishing.options import IMPOSSIBLE_FORMATS, ReleaseOptions


def test_by_default_the_own_format_is_released_if_no_limit_is_broken() -> None:
    assert ReleaseOptions().model_dump() == {"format": "auto_round", "even_if_worse": False}


@pytest.mark.parametrize("name", IMPOSSIBLE_FORMATS)
def test_a_format_of_other_tools_is_rejected_with_the_reason(name: str) -> None:
    with pytest.raises(ValidationError, match=f"cannot be {name}: .*ColQwen3"):
        ReleaseOptions.model_validate({"format": name})


@pytest.mark.parametrize(
    "values", [{"format": "zip"}, {"even_if_worse": 1}, {"formt": "auto_gptq"}]
)
def test_unknown_values_and_keys_are_rejected(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ReleaseOptions.model_validate(values)
