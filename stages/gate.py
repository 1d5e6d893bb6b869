"""Stage `gate@<recipe>`: the verdict on a recipe; fails if it breaks a limit, before its release.

A recipe with ``release.<recipe>.even_if_worse: true`` passes with its verdict, so that its release
can say FAILED and why.
"""

import logging
import sys
from dataclasses import asdict
from typing import Any

from pydantic import Field

from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_json
from stages.evaluation.limits import FEW_QUERIES, WORSE, GateParams, Verdict, judge
from stages.pipeline.params import Sections, choose_recipe, load_params
from stages.pipeline.paths import QUALITY_METRICS, QUANTIZE_METRICS, VERDICTS
from stages.pipeline.stage import claim, parse_recipe
from stages.publishing.options import ReleaseOptions
from stages.quantization.recipes import Recipe

logger = logging.getLogger(__name__)


class Params(Sections):
    """What this stage reads of params.yaml."""

    recipes: dict[str, Recipe]
    fallbacks: dict[str, str] = Field(default_factory=dict)
    release: dict[str, ReleaseOptions] = Field(default_factory=dict)
    gate: GateParams


def judge_recipe(name: str, params: Params) -> tuple[Verdict, int]:
    """Return the verdict on a recipe, and the number of queries that it rests on.

    Raises
    ------
    UserError
        If its metrics are missing, damaged, or lack a figure.
    """
    path, fix = QUALITY_METRICS / f"{name}.json", f"run `dvc repro evaluate@{name}`"
    metrics = read_json(path, fix)
    try:
        return judge(metrics, params.gate), metrics["data"]["queries"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: lacks a figure of the gate ({error}); {fix}") from None


def check_fallback(name: str, params: Params) -> None:
    """Warn of a recipe whose fallback ran, and reject one that is no longer its fallback as it ran.

    DVC cannot know of those values: a recipe's stage depends on its own parameters alone.

    Raises
    ------
    UserError
        If the metrics are missing or damaged, or the fallback changed since it ran.
    """
    path = QUANTIZE_METRICS / f"{name}.json"
    recipe: dict[str, Any] = read_json(path, f"run `dvc repro evaluate@{name}`").get("recipe", {})
    if "instead_of" not in recipe:
        return
    retry = f"run `dvc repro -f quantize@{name}`"
    logger.warning(
        "recipe %s failed (%s); %s ran instead of it; to try again, %s",
        name, recipe["because"], recipe["ran"], retry,
    )  # fmt: skip
    if params.fallbacks.get(name) != recipe["ran"]:
        raise UserError(f"{path}: is of {recipe['ran']}, which is no longer its fallback; {retry}")
    now = params.recipes.get(recipe["ran"])
    if now is None or now.model_dump() != recipe["values"]:
        raise UserError(f"{path}: is of the fallback {recipe['ran']}, which changed since; {retry}")


def main() -> None:
    """Write artifacts/gate/<recipe>.json, or fail with every broken limit."""
    name = parse_recipe("gate", __doc__)
    params = load_params(Params)
    choose_recipe(params.recipes, name)
    claim(f"gate@{name}")
    check_fallback(name, params)
    verdict, queries = judge_recipe(name, params)
    logger.info("%s: %s (%s)", name, verdict.verdict, verdict.reason)
    if queries < FEW_QUERIES:
        logger.warning(
            "%d queries are few; give %d or more for a firm verdict", queries, FEW_QUERIES
        )
    released_anyway = params.release.get(name, ReleaseOptions()).even_if_worse
    if verdict.verdict == WORSE and not released_anyway:
        for line in verdict.breaches:
            print(f"error: {QUALITY_METRICS / name}.json: {line}", file=sys.stderr)
        print(
            f"error: {name} is not released; change the recipe or the limit, or set "
            f"release.{name}.even_if_worse: true in params.yaml to release it marked FAILED",
            file=sys.stderr,
        )
        sys.exit(1)
    write_json(VERDICTS / f"{name}.json", {"recipe": name, **asdict(verdict)})


if __name__ == "__main__":
    run(main)
