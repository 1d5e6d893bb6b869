"""params.yaml, read once as YAML 1.2 (as DVC reads it) and validated key by key."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.errors import PipelineError

PARAMS_FILE = Path("params.yaml")
RECIPE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MAX_QUOTED = 80
# metrics/<recipe>.json and artifacts/.../<recipe> lie beside files of these names
RESERVED_NAMES = {"demo_training", "model", "original", "plots", "quantize", "speed", "summary"}


class Section(BaseModel):
    """A part of params.yaml: typed, frozen, and closed to keys that nothing reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _integer(value: object) -> object:
    if type(value) is not int:  # pydantic takes 4.0 for a literal 4
        raise ValueError("must be a whole number")
    return value


Integer = BeforeValidator(_integer)
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every library takes


class ModelParams(Section):
    """Which checkpoint to quantize."""

    source: str = Field(min_length=1)
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")
    trust_remote_code: bool
    max_num_visual_tokens: int = Field(ge=4)


class CalibrationParams(Section):
    """Which queries and pages AutoRound tunes on."""

    dataset: str = Field(min_length=1)
    queries: int = Field(ge=0)
    pages: int = Field(ge=0)
    seed: Seed

    @model_validator(mode="after")
    def _not_empty(self) -> "CalibrationParams":
        if self.queries + self.pages == 0:
            raise ValueError("queries and pages are both 0; ask for at least one sample")
        return self


class WeightFormat(Section):
    """How the weights of the language model's linears are stored."""

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


class AutoRoundRecipe(WeightFormat):
    """AutoRound: the rounding of each block tuned on the calibration samples."""

    method: Literal["autoround"]
    iters: int = Field(ge=0)
    lr: float | None = Field(default=None, gt=0, le=1)
    gradient_accumulate_steps: int = Field(default=8, ge=1)
    seed: Seed


Recipe = Annotated[RtnRecipe | AutoRoundRecipe, Field(discriminator="method")]


class EmbedParams(Section):
    """How evaluation queries and pages are embedded."""

    dtype: Literal["float32", "bfloat16"]
    queries_per_batch: int = Field(ge=1)
    visual_tokens_per_batch: int = Field(ge=1)


class EvaluateParams(Section):
    """What the quality is measured on."""

    dataset: str = Field(min_length=1)


class BenchmarkParams(Section):
    """How latency is measured."""

    dtype: Literal["float32", "bfloat16"]
    warmup: int = Field(ge=0)
    repeats: int = Field(ge=1)


class GateParams(Section):
    """Limits that fail the pipeline; null switches one off."""

    min_query_cosine: float | None = Field(ge=-1, le=1)
    min_page_cosine: float | None = Field(ge=-1, le=1)
    max_ndcg_at_5_drop: float | None = Field(ge=0, le=1)
    max_bytes: int | None = Field(gt=0)


class ComputeParams(Section):
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"]


class Params(Section):
    """The whole of params.yaml."""

    model: ModelParams
    calibration: CalibrationParams
    recipes: dict[str, Recipe]
    embed: EmbedParams
    evaluate: EvaluateParams
    benchmark: BenchmarkParams
    gate: GateParams
    compute: ComputeParams

    @field_validator("recipes")
    @classmethod
    def _recipe_names(cls, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
        if not recipes:
            raise ValueError("is empty; give at least one recipe")
        for name in recipes:
            if not RECIPE_NAME.fullmatch(name):
                raise ValueError(
                    f"name {name!r} is not allowed; use small letters, digits, '-' and '_'"
                )
            if name in RESERVED_NAMES:
                raise ValueError(f"name {name!r} is taken by another file; choose another")
        return recipes

    def recipe(self, name: str) -> RtnRecipe | AutoRoundRecipe:
        """Return the recipe called `name`.

        Raises
        ------
        PipelineError
            If there is none.
        """
        if name not in self.recipes:
            known = ", ".join(self.recipes)
            raise PipelineError(f"{PARAMS_FILE}: recipes.{name} does not exist; known: {known}")
        return self.recipes[name]


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate params.yaml.

    Raises
    ------
    PipelineError
        If the file is missing, is no YAML, or a key is missing, unknown or of the wrong kind.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror})") from None
    # damaged scalars such as 2026-99-99 raise what their constructors raise
    except (YAMLError, ValueError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise PipelineError(f"{path}: is not valid YAML ({reason})") from None
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise PipelineError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    """Say in one line what is wrong with which key, and how many more keys are wrong."""
    problems = error.errors(include_url=False)
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    if location[0:1] == ["recipes"]:
        del location[2:3]  # the method, by which a union names its member, is no key of the file
    key = ".".join(location)
    messages = {
        "extra_forbidden": "is an unknown key; remove it or mend its spelling",
        "missing": "is missing; add it",
        "union_tag_not_found": "lacks the key method; give rtn or autoround",
        "union_tag_invalid": "method must be rtn or autoround",
    }
    message = messages.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] not in messages and not isinstance(first["input"], dict):
        quoted = repr(first["input"])
        message += (
            f" (it is {quoted if len(quoted) <= MAX_QUOTED else quoted[:MAX_QUOTED] + '...'})"
        )
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key or 'the file'}: {message}{more}"
