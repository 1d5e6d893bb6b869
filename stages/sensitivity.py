"""Stage `sensitivity`: what quantizing each part of the model alone does to its embeddings.

What a budget of a recipe is spent by. Without a set of samples (``calibration: none``) nothing is
measured, and recipes cannot have a budget.
"""

from typing import Any

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.system.device import choose_device, make_deterministic
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import write_json
from stages.budget.options import SensitivityParams
from stages.calibration.sets import NO_SAMPLES
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import ComputeParams, ModelParams, Sections, load_params
from stages.pipeline.paths import CALIBRATION, SENSITIVITY, SENSITIVITY_PLOT
from stages.pipeline.stage import claim, stage_parser
from stages.quantization.samples import Origin, read_samples

KINDS = {"page": "pages", "query": "queries", "passage": "queries"}


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    compute: ComputeParams
    sensitivity: SensitivityParams


def choose_samples(origins: list[Origin], params: SensitivityParams) -> list[int]:
    """Return the places of the first pages and queries (passages count as queries).

    Raises
    ------
    UserError
        If the set has none of one of them.
    """
    wanted = {"pages": params.pages, "queries": params.queries}
    places: dict[str, list[int]] = {kind: [] for kind in wanted}
    for place, origin in enumerate(origins):
        kind = KINDS[origin.kind]
        if len(places[kind]) < wanted[kind]:
            places[kind].append(place)
    for kind, found in places.items():
        if not found:
            raise UserError(
                f"params.yaml: sensitivity.calibration: the set {params.calibration} has no {kind}; "
                "name one with pages and queries"
            )
    return sorted(place for found in places.values() for place in found)


def measure_all(params: Params) -> dict[str, Any]:
    """Return the content of artifacts/sensitivity.json."""
    from colqwen3.model.loading import source_dtype
    from stages.budget.sensitivity import measure, parts_of
    from stages.quantization.deepstack import fold_deepstack, fold_into_layer
    from stages.quantization.layers import load_front, load_layer
    from stages.quantization.sample_packs import attend_within_samples

    manifest = read_manifest()
    source = Checkpoint.read(find_inspected_model(params.model, manifest))
    origins, samples = read_samples(CALIBRATION / params.sensitivity.calibration)
    places = choose_samples(origins, params.sensitivity)
    device = choose_device(params.compute.device)
    make_deterministic()
    import torch

    dtype = torch.float32 if device.type == "cpu" else source_dtype(source)

    def front() -> Any:
        model = load_front(source, dtype, device)
        fold_deepstack(model)
        return model

    def layer(model: Any, index: int) -> torch.nn.Module:
        loaded: torch.nn.Module = load_layer(source, model, index, dtype)
        fold_into_layer(loaded, index)
        attend_within_samples(loaded)
        return loaded

    kinds = [KINDS[origins[place].kind] for place in places]
    config, group_size = manifest["config"], params.sensitivity.group_size
    chosen = [samples[place] for place in places]
    losses = measure(chosen, kinds, config, group_size, front, layer, device)
    return {
        "calibration": params.sensitivity.calibration,
        "group_size": group_size,
        "samples": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "items": {
            part: {"modules": list(names), "loss": losses[part]}
            for part, names in parts_of(config, group_size).items()
        },
    }


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the plot: part, bits, loss of pages and queries, and ``bar``, a label."""
    return [
        {"part": part, "bits": int(bits), "bar": f"{part}, {bits} bits", **loss}
        for part, item in result.get("items", {}).items()
        for bits, loss in item["loss"].items()
    ]


def main() -> None:
    """Write artifacts/sensitivity.json and its plot."""
    stage_parser("sensitivity", __doc__).parse_args()
    params = load_params(Params)
    claim("sensitivity")
    measured = params.sensitivity.calibration != NO_SAMPLES
    result: dict[str, Any] = measure_all(params) if measured else {"items": {}}
    write_json(SENSITIVITY_PLOT, bars(result))
    write_json(SENSITIVITY, result)


if __name__ == "__main__":
    run(main)
