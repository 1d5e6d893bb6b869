"""The recipes of params.yaml: how the weights of a checkpoint are made."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.pipeline.params import Integer, Section, Seed


class WeightFormat(Section):
    """How the quantized linears are stored."""

    bits: Annotated[Literal[2, 3, 4, 8], Integer]
    group_size: Annotated[Literal[32, 64, 128], Integer]
    sym: bool

    @field_validator("sym")
    @classmethod
    def _symmetric(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "must be true: asymmetric checkpoints cannot be loaded on a plain CPU, "
                "and the fast GPU kernels are symmetric only"
            )
        return value


class RtnRecipe(WeightFormat):
    """Plain rounding to nearest: no calibration data, no tuning."""

    method: Literal["rtn"]
    calibration: Literal["none"]  # spelled out in the file, because dvc.yaml makes a path of it
    linears: Literal["text", "all"] = "text"


class AutoRoundRecipe(WeightFormat):
    """AutoRound: the rounding of each block tuned on the calibration samples."""

    method: Literal["autoround"]
    calibration: str
    deepstack: bool = True
    iters: int = Field(ge=0)
    lr: float | None = Field(default=None, gt=0, le=1)
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulate_steps: int = Field(default=8, ge=1)
    seed: Seed


AnyRecipe = RtnRecipe | AutoRoundRecipe
Recipe = Annotated[AnyRecipe, Field(discriminator="method")]
"""A recipe as params.yaml holds it; `method` tells which of the two."""
