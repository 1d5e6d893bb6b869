"""params.yaml, read once as YAML 1.2 (as DVC reads it) and validated key by key."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

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

T = TypeVar("T")

PARAMS_FILE = Path("params.yaml")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MAX_QUOTED = 80
NO_SAMPLES = "none"  # the calibration set of rounding to nearest: it sees no data
# metrics/<recipe>.json and artifacts/.../<recipe> lie beside files of these names
Format = Literal["auto_round", "auto_gptq", "llm_compressor"]
IMPOSSIBLE_FORMATS = {
    "auto_awq": "AutoAWQ loads only model classes that it knows, and ColQwen3 is none of them",
    "gguf": "llama.cpp's converter knows no ColQwen3, and its files have no place for the projection",
    "mlx": "MLX loads only model classes that it knows, and ColQwen3 is none of them",
}
"""Formats that other tools write for other models -> why they cannot hold this one."""
RESERVED_NAMES = {"demo_training", "model", "original", "plots", "quantize", "speed", "summary"}


class Section(BaseModel):
    """A part of params.yaml: typed, frozen, and closed to keys that nothing reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _integer(value: object) -> object:
    if type(value) is not int:  # pydantic takes 4.0 for a literal 4
        raise ValueError("must be a whole number")
    return value


def _check_names(named: dict[str, T], taken: Collection[str] = ()) -> dict[str, T]:
    """Refuse a name that cannot be one of a file, or is one already."""
    for name in named:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"name {name!r} is not allowed; use small letters, digits, '-' and '_'"
            )
        if name in taken:
            raise ValueError(f"name {name!r} is taken by another file; choose another")
    return named


def _check_sets(
    recipes: Mapping[str, "Recipe"], sets: Collection[str], path: str, place: str
) -> None:
    """Refuse a recipe of `path` that is tuned on a set that `place` does not hold."""
    for name, recipe in recipes.items():
        if isinstance(recipe, AutoRoundRecipe) and recipe.calibration not in sets:
            raise ValueError(
                f"{path}.{name}.calibration: {_quote(recipe.calibration)} is no set of {place}; "
                f"known: {', '.join(sets) or 'none yet'}"
            )


def _check_fallbacks(recipes: Mapping[str, "Recipe"]) -> None:
    """Refuse a fallback that does not exist, or that needs more than the recipe's own stage has."""
    for name, recipe in recipes.items():
        if recipe.fallback is None:
            continue
        other = recipes.get(recipe.fallback)
        if other is None or recipe.fallback == name:
            known = ", ".join(key for key in recipes if key != name) or "none"
            raise ValueError(
                f"recipes.{name}.fallback: {_quote(recipe.fallback)} is no other recipe; known: {known}"
            )
        if other.calibration not in (NO_SAMPLES, recipe.calibration):
            raise ValueError(
                f"recipes.{name}.fallback: {recipe.fallback} is tuned on {other.calibration}, "
                f"which this recipe does not wait for; name one of the same set, or of method rtn"
            )


def _quote(value: object) -> str:
    quoted = repr(value)
    return quoted if len(quoted) <= MAX_QUOTED else quoted[:MAX_QUOTED] + "..."


Integer = BeforeValidator(_integer)
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every library takes


class ModelParams(Section):
    """Which checkpoint to quantize."""

    source: str = Field(min_length=1)
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")
    trust_remote_code: bool
    max_num_visual_tokens: int = Field(ge=4)


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
        return _check_names(sets, {NO_SAMPLES})


class WeightFormat(Section):
    """How the weights of the language model's linears are stored."""

    bits: Annotated[Literal[2, 3, 4, 8], Integer]
    group_size: Annotated[Literal[32, 64, 128], Integer]
    sym: bool
    format: Format = "auto_round"
    fallback: str | None = None

    @field_validator("format", mode="before")
    @classmethod
    def _possible_format(cls, value: object) -> object:
        if isinstance(value, str) and value in IMPOSSIBLE_FORMATS:
            raise ValueError(f"cannot be {value}: {IMPOSSIBLE_FORMATS[value]}")
        return value

    @model_validator(mode="after")
    def _format_takes_bits(self) -> "WeightFormat":
        if self.format == "llm_compressor" and self.bits not in (4, 8):
            raise ValueError(
                f"format llm_compressor takes 4 or 8 bits, not {self.bits}: the kernels that read "
                "its packed weights know no others"
            )
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
    calibration: Literal["none"]  # said in the file, because dvc.yaml makes a path of it
    linears: Literal["text", "all"] = "text"

    @model_validator(mode="after")
    def _format_takes_linears(self) -> "RtnRecipe":
        if self.linears == "all" and self.format == "auto_gptq":
            raise ValueError(
                "linears all cannot be written as auto_gptq: that format names one list of blocks, "
                "and the vision tower is a second one"
            )
        return self


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


Recipe = Annotated[RtnRecipe | AutoRoundRecipe, Field(discriminator="method")]


class EmbedParams(Section):
    """How evaluation queries and pages are embedded."""

    dtype: Literal["float32", "bfloat16"]
    queries_per_batch: int = Field(ge=1)
    visual_tokens_per_batch: int = Field(ge=1)


class EvaluateParams(Section):
    """What the quality is measured on."""

    dataset: str = Field(min_length=1)


BatchSize = Annotated[int, Field(ge=1, le=64)]


class BenchmarkParams(Section):
    """How latency is measured."""

    dtype: Literal["float32", "bfloat16"]
    query_tokens: int = Field(gt=10)  # ten of them are the augmentation tokens
    query_batches: list[BatchSize] = Field(min_length=1)
    page_batches: list[BatchSize] = Field(min_length=1)
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


class AblationParams(Section):
    """Recipes that only ablation/dvc.yaml makes, what they are tuned and what they are measured on."""

    datasets: dict[str, str] = Field(min_length=1)
    sets: dict[str, CalibrationSet]
    recipes: dict[str, Recipe]

    @field_validator("datasets")
    @classmethod
    def _dataset_names(cls, datasets: dict[str, str]) -> dict[str, str]:
        return _check_names(datasets, {"quantize"})

    @field_validator("sets")
    @classmethod
    def _set_names(cls, sets: dict[str, CalibrationSet]) -> dict[str, CalibrationSet]:
        return _check_names(sets, {NO_SAMPLES})

    @field_validator("recipes")
    @classmethod
    def _recipe_names(cls, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
        return _check_names(recipes, RESERVED_NAMES)


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
    ablation: AblationParams | None = None

    @field_validator("recipes")
    @classmethod
    def _recipe_names(cls, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
        if not recipes:
            raise ValueError("is empty; give at least one recipe")
        return _check_names(recipes, RESERVED_NAMES)

    @model_validator(mode="after")
    def _known_sets(self) -> "Params":
        _check_sets(self.recipes, self.calibration.sets, "recipes", "calibration.sets")
        _check_fallbacks(self.recipes)
        if self.ablation:
            sets = self.ablation.sets
            _check_sets(self.ablation.recipes, sets, "ablation.recipes", "ablation.sets")
        return self

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
    if "recipes" in location[:2]:
        method = location.index("recipes") + 2
        del location[method : method + 1]  # by which a union names its member: no key of the file
    key = ".".join(location)
    messages = {
        "extra_forbidden": "is an unknown key; remove it or mend its spelling",
        "missing": "is missing; add it",
        "union_tag_not_found": "lacks the key method; give rtn or autoround",
        "union_tag_invalid": "method must be rtn or autoround",
    }
    message = messages.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] not in messages and not isinstance(first["input"], dict):
        message += f" (it is {_quote(first['input'])})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if not key and first["type"] == "value_error":
        return message + more  # about several keys at once; it names them itself
    return f"{key or 'the file'}: {message}{more}"
