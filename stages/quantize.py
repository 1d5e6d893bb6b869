"""Stage `quantize@<recipe>`: the allocated weights in 2 to 8 bits, all else untouched."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import BLOCKS, VISION
from colqwen3.system.device import choose_device, free_memory, make_deterministic
from colqwen3.system.errors import NonFiniteWeightsError, first_line, run
from colqwen3.system.files import publish_folder, write_json
from colqwen3.system.resume import Scratch, work_key
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import ComputeParams, ModelParams, Sections, choose_recipe, load_params
from stages.pipeline.paths import ALLOCATION, CALIBRATION, CHECKPOINTS, QUANTIZED, SCRATCH
from stages.pipeline.stage import claim, parse_recipe
from stages.quantization.activations import SamplesLostError
from stages.quantization.allocation import describe_bits, read_allocation, uniform
from stages.quantization.checkpoint import (
    check_checkpoint,
    count_bytes,
    determinants,
    layer_order,
    make_checkpoint,
)
from stages.quantization.end_to_end import EndToEndOutcome
from stages.quantization.linears import Job
from stages.quantization.memory import check_memory, sizes_of
from stages.quantization.recipes import Recipe
from stages.quantization.samples import read_samples
from stages.quantization.tuning import Outcome

logger = logging.getLogger(__name__)

FOLDERS = re.compile(r"(?<![\w.])/(?:[^/\s:]+/)+")
"""The folders of an absolute path: metrics must not reveal the machine."""


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    compute: ComputeParams
    recipes: dict[str, Recipe]
    fallbacks: dict[str, str] = Field(default_factory=dict)


class RecipeFailedError(Exception):
    """A recipe failed by its own doing: what its fallback is for."""


def is_reason_for_fallback(error: Exception) -> bool:
    """Whether a fallback may run: memory ran out, samples were lost, or weights are not finite.

    A full disk or a defect of this code would hit the fallback too, or be hidden by it.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, SamplesLostError | NonFiniteWeightsError):
        return True
    # torch's allocator on a CPU
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def quantize(
    name: str,
    ran: str,
    params: Params,
    manifest: dict[str, Any],
    source: Path,
    reason: str | None = None,
) -> None:
    """Make artifacts/checkpoints/<name> and the file that says how, by the recipe called `ran`.

    Parameters
    ----------
    name
        The recipe whose stage this is.
    ran
        The same, or its fallback.
    params, manifest, source
        Of the pipeline.
    reason
        Why the recipe itself failed, where `ran` is its fallback.

    Raises
    ------
    UserError
        If inputs are missing or damaged, or another process makes the same recipe.
    RecipeFailedError
        If the recipe itself cannot be carried out: memory ran out, samples were lost, or weights
        are not finite.
    """
    recipe = params.recipes[ran]
    if ran == name:
        allocation = read_allocation(ALLOCATION / f"{name}.json")
    else:
        allocation = uniform(ran, recipe, manifest["config"])
    device = choose_device(params.compute.device)
    calibration = CALIBRATION / recipe.calibration
    origins, samples = read_samples(calibration)
    inputs = determinants(recipe, allocation, manifest, calibration, device)
    # a failed recipe keeps its work: once fixed, it continues there
    work = SCRATCH / (name if ran == name else f"{name}.fallback")
    with Scratch(work, work_key(inputs)) as scratch:
        try:
            kinds = [origin.kind for origin in origins]
            job = Job(Checkpoint.read(source), allocation, recipe, samples, device, scratch, kinds)
            sizes = sizes_of(job, manifest["config"])
            # now, and not after all layers
            check_memory(ran, recipe, sizes, device, done=scratch.files)
            partial, filled = make_checkpoint(job)
        except Exception as error:
            if not is_reason_for_fallback(error):
                raise
            raise RecipeFailedError(str(error)) from error
        check_checkpoint(partial, job)
        errors = filled.weight_errors
        record = {
            "recipe": {
                "ran": ran,
                "values": recipe.model_dump(),
                **({"instead_of": name, "because": reason} if reason else {}),
            },
            "libraries": inputs["versions"],
            "bytes": count_bytes(partial),
            "linears": {
                "planned": len(allocation.linears),
                "quantized": len(errors.keys() & allocation.linears),
            },
            "bits": {
                "token_embeddings": allocation.token_embeddings,
                **describe_bits(allocation),
            },
            "calibration": {
                "set": recipe.calibration,
                "sha256": inputs["calibration"],
                "samples": len(samples),
                "queries": sum(origin.kind == "query" for origin in origins),
                "pages": sum(origin.kind == "page" for origin in origins),
                "passages": sum(origin.kind == "passage" for origin in origins),
                "tokens": sum(origin.tokens for origin in origins),
            },
            "relative_weight_error": {
                layer.removeprefix(BLOCKS + "."): round(errors[layer], 6)
                for layer in sorted(errors, key=layer_order)
            },
            "layers_worse_than_rounding": sum(
                not outcome.tuning_won for outcome in (*filled.outcomes, *filled.tower.values())
            ),
            "layer_errors": [describe_outcome(outcome) for outcome in filled.outcomes],
            **describe_end_to_end(filled.end_to_end),
            "vision_errors": {
                module.removeprefix(f"{VISION}."): describe_outcome(outcome)
                for module, outcome in filled.tower.items()
            },
        }
        write_json(QUANTIZED / f"{name}.json", record)
        publish_folder(partial, CHECKPOINTS / name)
        scratch.remove()


def describe_outcome(outcome: Outcome) -> dict[str, float]:
    """Return the output errors of a layer as the metrics hold them."""
    return {"tuned": round(outcome.tuned, 6), "rounded": round(outcome.rounded, 6)}


def describe_end_to_end(outcome: EndToEndOutcome | None) -> dict[str, Any]:
    """Return the losses before and after end-to-end tuning as the metrics hold them, if it ran."""
    if outcome is None:
        return {}
    figures = {
        name: {
            kind: {"before": round(before[kind], 8), "after": round(after[kind], 8)}
            for kind in before
        }
        for name, before, after in (
            ("tuned_on", outcome.before, outcome.after),
            ("held_back", outcome.held_before, outcome.held_after),
        )
    }
    return {"end_to_end": {"kept": outcome.won, "loss": figures}}


def main() -> None:
    """Make artifacts/checkpoints/<recipe> and artifacts/quantize/<recipe>.json."""
    name = parse_recipe("quantize", __doc__)
    params = load_params(Params)
    choose_recipe(params.recipes, name)
    fallback = params.fallbacks.get(name)
    claim(f"quantize@{name}")
    manifest = read_manifest()
    source = find_inspected_model(params.model, manifest)
    if fallback:  # a mistake in it shows now, not after hours
        uniform(fallback, choose_recipe(params.recipes, fallback), manifest["config"])
    make_deterministic()
    try:
        quantize(name, name, params, manifest, source)
        return
    except RecipeFailedError as error:
        cause = error.__cause__ or error
        if fallback is None:
            raise cause from None
        reason = FOLDERS.sub("", first_line(cause))
    # outside of the block, which holds the frames of what failed and all that is in them
    del cause
    free_memory()
    logger.warning("recipe %s failed (%s); its fallback %s runs instead", name, reason, fallback)
    quantize(name, fallback, params, manifest, source, reason)


if __name__ == "__main__":
    run(main)
