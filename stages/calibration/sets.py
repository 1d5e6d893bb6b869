"""The calibration sets of params.yaml: how many samples of each kind AutoRound tunes on."""

from pydantic import Field, field_validator, model_validator

from stages.pipeline.params import Section, Seed, check_names

NO_SAMPLES = "none"  # the calibration set of rounding to nearest: it sees no data


class CalibrationSet(Section):
    """How many samples of each kind are drawn, and by which seed (null: ``calibration.seed``)."""

    queries: int = Field(ge=0)
    pages: int = Field(ge=0)
    passages: int = Field(ge=0)
    seed: Seed | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> "CalibrationSet":
        if self.queries + self.pages + self.passages == 0:
            raise ValueError("queries, pages and passages are all 0; ask for at least one sample")
        return self


class CalibrationParams(Section):
    """What AutoRound tunes on: named sets of samples from one dataset."""

    dataset: str = Field(min_length=1)
    seed: Seed
    sets: dict[str, CalibrationSet]

    @field_validator("sets")
    @classmethod
    def _set_names(cls, sets: dict[str, CalibrationSet]) -> dict[str, CalibrationSet]:
        return check_names(sets, {NO_SAMPLES})
