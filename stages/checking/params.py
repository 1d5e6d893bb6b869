"""The whole of params.yaml, and what its sections must agree on."""

from collections.abc import Collection, Iterable, Mapping

from pydantic import Field, field_validator, model_validator

from colqwen3.gguf.layout import TWO_BITS
from stages.budget.options import SensitivityParams
from stages.calibration.sets import NO_SAMPLES, CalibrationParams
from stages.evaluation.limits import GateParams
from stages.pipeline.params import (
    BenchmarkParams,
    ComputeParams,
    EmbedParams,
    EvaluateParams,
    ModelParams,
    Section,
    ServingOptions,
    check_names,
    quote,
    suggest,
)
from stages.publishing.options import ReleaseOptions
from stages.quantization.recipes import AnyRecipe, Recipe, RtnRecipe

RESERVED_NAMES = {"original"}  # artifacts/embeddings/original.safetensors


def check_sets(
    recipes: Mapping[str, AnyRecipe], sets: Collection[str], recipes_key: str, sets_key: str
) -> None:
    """Reject a recipe that is tuned on a set that does not exist.

    Parameters
    ----------
    recipes, sets
        Recipes by name, and names of sets.
    recipes_key, sets_key
        Where they stand, for the error.

    Raises
    ------
    ValueError
        Naming the recipe.
    """
    for name, recipe in recipes.items():
        if not isinstance(recipe, RtnRecipe) and recipe.calibration not in sets:
            raise ValueError(
                f"{recipes_key}.{name}.calibration: {quote(recipe.calibration)} is not a set of "
                f"{sets_key}{suggest(recipe.calibration, sets)} (known: {', '.join(sets) or 'none yet'})"
            )


class Params(Section):
    """The whole of params.yaml."""

    model: ModelParams
    calibration: CalibrationParams
    recipes: dict[str, Recipe]
    sensitivity: SensitivityParams
    fallbacks: dict[str, str] = Field(default_factory=dict)
    release: dict[str, ReleaseOptions] = Field(default_factory=dict)
    serving: dict[str, ServingOptions] = Field(default_factory=dict)
    embed: EmbedParams
    evaluate: EvaluateParams
    benchmark: BenchmarkParams
    gate: GateParams
    compute: ComputeParams

    @field_validator("recipes")
    @classmethod
    def _recipe_names(cls, recipes: dict[str, AnyRecipe]) -> dict[str, AnyRecipe]:
        if not recipes:
            raise ValueError("is empty; give at least one recipe")
        return check_names(recipes, RESERVED_NAMES)

    @model_validator(mode="after")
    def _sections_agree(self) -> "Params":
        check_sets(self.recipes, self.calibration.sets, "recipes", "calibration.sets")
        self._check_budgets()
        self._check_samples_held_back()
        named: dict[str, Iterable[str]] = {
            "fallbacks": self.fallbacks,
            "release": self.release,
            "serving": self.serving,
        }
        for section, names in named.items():
            for name in names:
                if name not in self.recipes:
                    raise ValueError(
                        f"{section}.{name}: no such recipe{suggest(name, self.recipes)} "
                        f"(known: {', '.join(self.recipes)})"
                    )
        for name, served in self.serving.items():
            on_gpu = self.compute.device == "cuda"
            if on_gpu and served.activations == "int8" and self.embed.dtype != "bfloat16":
                raise ValueError(
                    f"serving.{name}.activations: int8 needs embed.dtype: bfloat16 on a GPU"
                )
        for name, fallback in self.fallbacks.items():
            self._check_fallback(name, fallback)
        for name, options in self.release.items():
            self._check_format(name, options)
        return self

    def _check_budgets(self) -> None:
        """Reject a budget whose sensitivity is not measured, or on a set that does not exist."""
        named, sets = self.sensitivity.calibration, self.calibration.sets
        if named != NO_SAMPLES and named not in sets:
            raise ValueError(
                f"sensitivity.calibration: {quote(named)} is not a set of calibration.sets"
                f"{suggest(named, sets)} (known: {NO_SAMPLES}, {', '.join(sets)})"
            )
        for name, recipe in self.recipes.items():
            if not recipe.has_budget:
                continue
            if named == NO_SAMPLES:
                raise ValueError(
                    f"recipes.{name} has a budget, but the sensitivity is not measured; set "
                    "sensitivity.calibration to a set of calibration.sets"
                )
            if recipe.group_size != self.sensitivity.group_size:
                raise ValueError(
                    f"recipes.{name}.group_size is {recipe.group_size}, but the sensitivity is "
                    f"measured with {self.sensitivity.group_size}; set both to one size"
                )

    def _check_samples_held_back(self) -> None:
        """Reject tuning end to end on one sample of a kind, which leaves none to judge it by."""
        for name, recipe in self.recipes.items():
            if isinstance(recipe, RtnRecipe) or recipe.end_to_end is None:
                continue
            counts = self.calibration.sets[recipe.calibration]
            for kind in ("queries", "pages", "passages"):
                if getattr(counts, kind) == 1:
                    raise ValueError(
                        f"calibration.sets.{recipe.calibration}.{kind} is 1, but "
                        f"recipes.{name}.end_to_end tunes on one sample and needs another to see "
                        "whether that helped; set 2 or more, or 0"
                    )

    def _check_fallback(self, name: str, fallback: str) -> None:
        """Reject a fallback that does not exist, or needs more than the recipe's stage has."""
        other = self.recipes.get(fallback)
        if other is None or fallback == name:
            known = ", ".join(key for key in self.recipes if key != name) or "none"
            raise ValueError(
                f"fallbacks.{name}: {quote(fallback)} is not another recipe (known: {known})"
            )
        if other.has_budget:
            raise ValueError(
                f"fallbacks.{name}: {fallback} has a budget; name a recipe of one width for all linears"
            )
        if other.calibration not in (NO_SAMPLES, self.recipes[name].calibration):
            raise ValueError(
                f"fallbacks.{name}: {fallback} is tuned on {other.calibration}, which {name} does "
                "not wait for; name a recipe of the same set, or of method rtn"
            )

    def _check_format(self, name: str, options: ReleaseOptions) -> None:
        """Reject a format that cannot hold the recipe's weights."""
        recipe, where = self.recipes[name], f"release.{name}.format: {options.format}"
        widths = recipe.possible_widths
        if options.format == "llm_compressor" and (odd := widths - {4, 8}):
            raise ValueError(
                f"{where} takes 4 or 8 bits, not {min(odd)}: the kernels that read its packed weights "
                "support no others"
            )
        if options.format == "gguf" and 2 in widths:
            raise ValueError(f"{where} takes 3, 4 or 8 bits, not 2: {TWO_BITS}")
        if options.format != "auto_gptq":
            return
        if recipe.vision_too:
            raise ValueError(
                f"{where} cannot hold a recipe that quantizes the vision tower, because that format "
                "names one list of blocks and the vision tower is a second one"
            )
        if recipe.has_budget or (recipe.token_embeddings or 16) < 16:
            raise ValueError(
                f"{where} cannot hold a budget or quantized token embeddings, because that format "
                "has one width for all that it quantizes"
            )
