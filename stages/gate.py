"""Stage `gate`: fails the pipeline, after all metrics are written, when a recipe breaks a limit."""

import argparse
import logging
import sys
from collections.abc import Mapping
from typing import Any

from stages.errors import PipelineError, run
from stages.files import read_json
from stages.params import GateParams, Params, load_params
from stages.paths import METRICS, QUANTIZE_METRICS

logger = logging.getLogger(__name__)


def find_breaches(metrics: Mapping[str, Any], gate: GateParams) -> list[str]:
    """Return one line for every limit that a recipe's metrics break; a figure may equal its limit.

    A cosine limit is also broken by NaN or Inf in the embeddings: the cosine leaves such tokens
    out, so it cannot vouch for them.

    Raises
    ------
    KeyError, TypeError
        If the metrics lack a figure.
    """
    breaches = []
    cosines = {
        "queries": ("gate.min_query_cosine", gate.min_query_cosine),
        "pages": ("gate.min_page_cosine", gate.min_page_cosine),
    }
    # each test is written so that a NaN breaks it
    for kind, (key, least) in cosines.items():
        if least is None:
            continue
        cosine, nonfinite = metrics[kind]["cosine"]["mean"], metrics[kind]["nonfinite"]
        if not cosine >= least:
            breaches.append(f"{kind}.cosine.mean {cosine} is below {key} {least}")
        if not nonfinite <= 0:
            breaches.append(f"{kind}.nonfinite {nonfinite} is above 0, as {key} {least} asks for")
    if (most := gate.max_ndcg_at_5_drop) is not None:
        drop = -metrics["retrieval"]["ndcg_at_5"]["difference"]
        if not drop <= most:
            breaches.append(f"drop of ndcg_at_5 {drop} is above gate.max_ndcg_at_5_drop {most}")
    if gate.max_bytes is not None:
        size = metrics["size"]["files"]["quantized"]
        if not size <= gate.max_bytes:
            breaches.append(f"size.files.quantized {size} is above gate.max_bytes {gate.max_bytes}")
    return breaches


def check_recipe(recipe: str, gate: GateParams) -> list[str]:
    """Return the breaches of a recipe, each with its metrics file.

    Raises
    ------
    PipelineError
        If the file is missing, damaged, or lacks a figure.
    """
    path, mend = METRICS / f"{recipe}.json", f"run `dvc repro evaluate@{recipe}`"
    try:
        return [f"{path}: {breach}" for breach in find_breaches(read_json(path, mend), gate)]
    except (KeyError, TypeError) as error:
        raise PipelineError(f"{path}: lacks a figure of the gate ({error}); {mend}") from None


def check_fallback(recipe: str, params: Params) -> list[str]:
    """Warn of a recipe whose fallback ran; return a breach if that one's values changed since.

    DVC cannot know of those values: the recipe's own stage depends on its own parameters.

    Raises
    ------
    PipelineError
        If the file is damaged.
    """
    path, mend = QUANTIZE_METRICS / f"{recipe}.json", f"run `dvc repro quantize@{recipe}`"
    # where it is missing, `evaluate` has failed already
    made = read_json(path, mend).get("recipe", {}) if path.exists() else {}
    if "instead_of" not in made:
        return []
    logger.warning(
        "recipe %s failed (%s); %s ran instead of it", recipe, made["because"], made["ran"]
    )
    now = params.recipes.get(made["ran"])
    if now is not None and now.model_dump() == made["values"]:
        return []
    return [
        f"{path}: made by the fallback {made['ran']}, which changed since; "
        f"run `dvc repro -f quantize@{recipe}`"
    ]


def main() -> None:
    """Check every recipe; print every breach, and exit with status 1 if there is one."""
    argparse.ArgumentParser(prog="python -m stages.gate", description=__doc__).parse_args()
    params = load_params()
    breaches = [line for recipe in params.recipes for line in check_recipe(recipe, params.gate)]
    breaches += [line for recipe in params.recipes for line in check_fallback(recipe, params)]
    for line in breaches:
        print(f"error: {line}", file=sys.stderr)
    if breaches:
        sys.exit(1)
    logger.info("%d recipes are within every limit of gate", len(params.recipes))


if __name__ == "__main__":
    run(main)
