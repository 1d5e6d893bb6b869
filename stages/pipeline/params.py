"""params.yaml, read as YAML 1.2 (as DVC reads it) and validated key by key.

A stage reads only the sections that it needs, so that an edit of another section's schema neither
reruns it nor discards its unfinished work. `stages.checking.params` has the whole file.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from colqwen3.system.errors import UserError

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

PARAMS_FILE = Path("params.yaml")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
MAX_QUOTED = 80


class Section(BaseModel):
    """A part of params.yaml: typed, frozen, and closed to keys that nothing reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Sections(BaseModel):
    """The sections of params.yaml that one stage reads; others are left unread."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


def _integer(value: object) -> object:
    if type(value) is not int:  # pydantic accepts 4.0 for a literal 4
        raise ValueError("must be a whole number")
    return value


def check_names(named: dict[str, T], taken: Collection[str] = ()) -> dict[str, T]:
    """Reject a name that cannot be part of a file name, or is in `taken`.

    Raises
    ------
    ValueError
        Naming it.
    """
    for name in named:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"name {name!r} is not allowed; use lower-case letters, digits, '-' and '_'"
            )
        if name in taken:
            raise ValueError(f"name {name!r} is reserved; choose another")
    return named


def quote(value: object) -> str:
    """Return a value as an error message shows it, cut at 80 characters."""
    quoted = repr(value)
    return quoted if len(quoted) <= MAX_QUOTED else quoted[:MAX_QUOTED] + "..."


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean ...?`` with the most similar known word, or nothing."""
    plain = {name.replace("_", "").lower(): name for name in known}
    close = difflib.get_close_matches(word.replace("_", "").lower(), plain, 1, 0.7)
    return f"; did you mean {plain[close[0]]}?" if close else ""


Integer = BeforeValidator(_integer)
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that every library accepts


class ModelParams(Section):
    """Which checkpoint to quantize."""

    source: str = Field(min_length=1)
    revision: str | None = Field(pattern=r"^[0-9a-f]{40}$")
    trust_remote_code: bool
    max_num_visual_tokens: int = Field(ge=4)


class EmbedParams(Section):
    """How evaluation queries and pages are embedded."""

    dtype: Literal["float32", "bfloat16"]
    queries_per_batch: int = Field(ge=1)
    visual_tokens_per_batch: int = Field(ge=1)


class ServingOptions(Section):
    """How one recipe's checkpoint is served, and so embedded here."""

    activations: Literal["bfloat16", "int8"]


IndexFormat = Literal[
    "float32", "float16", "int8", "binary",
    "pool2-float16", "pool3-float16", "pool2-int8", "pool3-int8",
]  # fmt: skip


class EvaluateParams(Section):
    """The dataset that quality is measured on, and the index formats to compare."""

    dataset: str = Field(min_length=1)
    index: list[IndexFormat] = []


BatchSize = Annotated[int, Field(ge=1, le=64)]


class BenchmarkParams(Section):
    """How latency is measured."""

    dtype: Literal["float32", "bfloat16"]
    query_tokens: int = Field(gt=10)  # ten of them are the augmentation tokens
    query_batches: list[BatchSize] = Field(min_length=1)
    page_batches: list[BatchSize] = Field(min_length=1)
    int8_activations: bool
    warmup: int = Field(ge=0)
    repeats: int = Field(ge=1)


class ComputeParams(Section):
    """The device that stages run on."""

    device: Literal["auto", "cpu", "cuda"]


def choose_recipe(recipes: Mapping[str, T], name: str) -> T:
    """Return the recipe called `name`.

    Raises
    ------
    UserError
        If there is none.
    """
    if name not in recipes:
        raise UserError(
            f"{PARAMS_FILE}: recipes.{name}: no such recipe{suggest(name, recipes)} "
            f"(known: {', '.join(recipes)})"
        )
    return recipes[name]


def read_yaml(path: Path = PARAMS_FILE) -> Any:
    """Read a YAML 1.2 file.

    Raises
    ------
    UserError
        If it is missing or is not valid YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); run from the root of the repository"
        ) from None
    # damaged scalars such as 2026-99-99 raise what their constructors raise
    except (YAMLError, ValueError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is not valid YAML ({reason}); fix the line") from None


def load_params(schema: type[Model], path: Path = PARAMS_FILE) -> Model:
    """Read params.yaml and validate the sections that `schema` names.

    Raises
    ------
    UserError
        If the file is missing, is not valid YAML, or a key is missing, unknown or of the wrong
        type.
    """
    raw = read_yaml(path)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_describe(error, schema)}") from None


def _describe(error: ValidationError, schema: type[BaseModel]) -> str:
    """Say in one line what is wrong with which key, and how many more keys are wrong.

    Unknown keys go first: what is missing is often missing because of them.
    """
    problems = sorted(
        error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden"
    )
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    member = None  # by which a union names the chosen schema: no key of the file
    if "recipes" in location[:2]:
        place = location.index("recipes") + 2
        member = location[place] if place < len(location) else None
        del location[place : place + 1]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(schema, location[:-1], member)
        message = f"unknown key{suggest(location[-1], known) or '; remove it'}"
        if location[-1] in ("format", "fallback") and location[:1] == ["recipes"]:
            moved = {
                "format": f"release.{location[1]}.format",
                "fallback": f"fallbacks.{location[1]}",
            }
            message = f"unknown key; it belongs in {moved[location[-1]]}"
    else:
        tag = first.get("ctx", {}).get("tag")
        messages = {
            "missing": "is missing; add it",
            "union_tag_not_found": "lacks the key method; give autoround, gptq or rtn",
            "union_tag_invalid": f"method must be autoround, gptq or rtn (it is {quote(tag)})",
        }
        message = messages.get(first["type"], first["msg"].removeprefix("Value error, "))
        if first["type"] not in messages and not isinstance(first["input"], dict):
            message += f" (it is {quote(first['input'])})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if not key and first["type"] == "value_error":
        return message + more  # about several keys at once; it names them itself
    return f"{key or 'the file'}: {message}{more}"


def _literals(field: FieldInfo) -> tuple[Any, ...]:
    """Return the values that a field of type Literal allows."""
    return get_args(field.annotation)


def _known_keys(annotation: Any, path: list[str], member: str | None) -> set[str]:
    """Return the keys that the section at `path` may have; `member` chooses among schemas."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        if path:  # another member of a union may lack the section
            inside = fields.get(path[0])
            return _known_keys(inside.annotation, path[1:], member) if inside else set()
        other = member and "method" in fields and member not in _literals(fields["method"])
        return set() if other else set(fields)
    parts = get_args(annotation)
    if get_origin(annotation) is dict:
        return _known_keys(parts[1], path[1:], member) if path else set()
    if get_origin(annotation) is Annotated:
        return _known_keys(parts[0], path, member)
    return {key for part in parts for key in _known_keys(part, path, member)}
