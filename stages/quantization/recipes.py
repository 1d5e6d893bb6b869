"""The recipes of params.yaml: how the weights of a checkpoint are made."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from colqwen3.system.errors import UserError
from stages.pipeline.params import Integer, Section, Seed

STEP_SIZE_LIMIT = 0.1
"""In units of a code. On the demo model, 10 steps of 0.1 made a layer worse than rounding, 5 of 0.2 all."""


def _for_each_part(value: object) -> object:
    return dict.fromkeys(VisionBits.model_fields, value) if type(value) is int else value


def _width(value: object) -> object:
    if value is None or (type(value) is int and value in BITS):
        return value
    if type(value) is float and min(BITS) < value < max(BITS) and not value.is_integer():
        return value
    raise ValueError("must be 2, 3, 4 or 8, or an average between them such as 3.5")


class VisionBits(Section):
    """Bits of the linears of the vision tower by part; 16 leaves a part as it is.

    Without a value, a part is left as it is, unless a budget of bytes is free to choose.
    """

    attention: Literal[16, 8, 4] | None = None
    mlp: Literal[16, 8, 4] | None = None
    mergers: Literal[16, 8, 4] | None = None


BITS = (2, 3, 4, 8)
"""Widths of linears; as in colqwen3/checkpoint/layout.py, on which stages that only read recipes do not depend."""


class WeightFormat(Section):
    """How the quantized weights are stored: one width, or a budget that widths are chosen for."""

    bits: Annotated[int | float | None, BeforeValidator(_width)] = None
    bytes: Annotated[int | float, Field(ge=1)] | None = None
    widths: list[Literal[2, 3, 4, 8]] = Field(default=[2, 3, 4, 8], min_length=1)
    group_size: Annotated[Literal[32, 64, 128], Integer]
    sym: bool
    token_embeddings: Literal[16, 8, 4] | None = None
    vision: Annotated[VisionBits, BeforeValidator(_for_each_part)] = VisionBits()

    @property
    def has_budget(self) -> bool:
        """Whether the widths of the linears are chosen, within bytes or an average of bits."""
        return self.bytes is not None or isinstance(self.bits, float)

    @property
    def vision_too(self) -> bool:
        """Whether linears of the vision tower are or may be quantized beside the language model's."""
        return self.bytes is not None or min(self.vision_bits.values()) < 16

    @property
    def vision_bits(self) -> dict[str, int]:
        """Bits of each part of the vision tower where no budget chooses them."""
        return {part: bits or 16 for part, bits in self.vision.model_dump().items()}

    @property
    def possible_widths(self) -> set[int]:
        """Bits that linears of this recipe may have."""
        text = set(self.widths) if self.has_budget else {int(self.bits or 0)}
        return (text | set(self.vision_bits.values())) - {16}

    @model_validator(mode="after")
    def _one_size(self) -> "WeightFormat":
        if (self.bits is None) == (self.bytes is None):
            raise ValueError("needs one of bits and bytes: a width, or a budget")
        if not self.has_budget and self.widths != list(BITS):
            raise ValueError("widths are for a budget: bytes, or an average of bits such as 3.5")
        return self

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


class EndToEnd(Section):
    """Tuning of all codes and scales together, on the final embeddings, once the layers are done."""

    steps: int = Field(ge=1)
    codes_lr: float = Field(default=0.003, ge=0, le=0.1)
    scales_lr: float = Field(default=0.001, ge=0, le=0.1)
    seed: Seed = 42

    @model_validator(mode="before")
    @classmethod
    def _section(cls, value: object) -> object:
        if not isinstance(value, dict | EndToEnd):
            raise ValueError("must be keys such as {steps: 200}, or null for none")
        return value

    @model_validator(mode="after")
    def _moves(self) -> "EndToEnd":
        if self.codes_lr == self.scales_lr == 0:
            raise ValueError(
                "codes_lr and scales_lr are both 0, which tunes nothing; leave one out"
            )
        return self


class _Calibrated(WeightFormat):
    """What all recipes have that see calibration samples."""

    calibration: str
    deepstack: bool = True
    batch_size: int = Field(default=1, ge=1)
    end_to_end: EndToEnd | None = None

    @model_validator(mode="after")
    def _true_activations(self) -> "_Calibrated":
        if self.end_to_end and not self.deepstack:
            raise ValueError("end_to_end needs the activations of the model: leave deepstack true")
        return self


class AutoRoundRecipe(_Calibrated):
    """AutoRound: the rounding of each block tuned on the calibration samples."""

    method: Literal["autoround"]
    iters: int = Field(ge=0)
    lr: float | None = Field(default=None, gt=0, le=1)
    gradient_accumulate_steps: int = Field(default=8, ge=1)
    seed: Seed

    @model_validator(mode="after")
    def _step_size_can_work(self) -> "AutoRoundRecipe":
        if self.iters and self.step_size >= STEP_SIZE_LIMIT:
            origin = "1 / iters, since lr is absent or null" if self.lr is None else "lr"
            raise ValueError(
                f"step size {self.step_size:g} ({origin}) is {STEP_SIZE_LIMIT:g} or more, with which "
                "tuning ends worse than rounding; set lr to 0.005, say"
            )
        return self

    @property
    def step_size(self) -> float:
        """Step size of the first of `iters` steps; it falls linearly to 0 after the last."""
        return 1 / self.iters if self.lr is None else self.lr


class GptqRecipe(_Calibrated):
    """GPTQ: each linear rounded in one pass by the second moments of its inputs.

    With ``hessian: model`` tokens and outputs count by what they do to the final embeddings.
    """

    method: Literal["gptq"]
    hessian: Literal["layer", "model"] = "layer"

    @model_validator(mode="after")
    def _true_gradients(self) -> "GptqRecipe":
        if self.hessian == "model" and not self.deepstack:
            raise ValueError(
                "hessian: model needs the activations of the model: leave deepstack true"
            )
        return self


TunedRecipe = AutoRoundRecipe | GptqRecipe
"""A recipe that sees calibration samples."""
AnyRecipe = RtnRecipe | TunedRecipe
Recipe = Annotated[AnyRecipe, Field(discriminator="method")]
"""A recipe as params.yaml holds it; `method` tells which."""


def check_group_size(name: str, recipe: WeightFormat, linears: Mapping[str, Sequence[int]]) -> None:
    """Check that the recipe called `name` has a group size that fits the linears to quantize.

    Parameters
    ----------
    name, recipe
        Of params.yaml.
    linears
        Name -> [out_features, in_features].

    Raises
    ------
    UserError
        Naming the first linear whose inputs it does not divide.
    """
    for linear, (_, in_features) in linears.items():
        if in_features % recipe.group_size:
            raise UserError(
                f"params.yaml: recipes.{name}.group_size is {recipe.group_size}, which does not "
                f"divide the {in_features} inputs of {linear}; choose a smaller one"
            )
