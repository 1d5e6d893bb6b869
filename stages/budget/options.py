"""The section ``sensitivity`` of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field

from stages.pipeline.params import Integer, Section


class SensitivityParams(Section):
    """On which samples the sensitivity of each part is measured; ``none``: it is not."""

    calibration: str
    pages: int = Field(ge=1)
    queries: int = Field(ge=1)
    group_size: Annotated[Literal[32, 64, 128], Integer]
