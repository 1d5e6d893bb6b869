"""Stage `calibrate`: queries, pages and passages as the processor makes them, one sample each.

A sample is what one calibration forward takes: batch of one, nothing padded. Every set of
``calibration.sets`` has a folder of its own, so that a recipe depends on just the samples that it
uses. The set ``none`` is empty: rounding to nearest is not done again when the samples change.
"""

from dataclasses import asdict

from colqwen3.system.errors import run
from colqwen3.system.files import fresh_folder, publish_folder, write_json
from stages.calibration.drawing import make_samples
from stages.calibration.sets import NO_SAMPLES, CalibrationParams
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import ModelParams, Sections, load_params
from stages.pipeline.paths import CALIBRATION, SCRATCH
from stages.pipeline.stage import claim, stage_parser
from stages.quantization.samples import INDEX


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    calibration: CalibrationParams


def main() -> None:
    """Write artifacts/calibration."""
    from colqwen3.model.loading import load_processor

    stage_parser("calibrate", __doc__).parse_args()
    params = load_params(Params)
    claim("calibrate")
    source = find_inspected_model(params.model, read_manifest())
    processor = load_processor(
        source, params.model.max_num_visual_tokens, params.model.trust_remote_code
    )
    partial = fresh_folder(SCRATCH / CALIBRATION.name)
    for name in (*params.calibration.sets, NO_SAMPLES):
        folder = partial / name
        folder.mkdir()
        drawn = name != NO_SAMPLES
        origins = make_samples(params.calibration, name, processor, folder) if drawn else []
        write_json(folder / INDEX, {"samples": [asdict(origin) for origin in origins]})
    publish_folder(partial, CALIBRATION)


if __name__ == "__main__":
    run(main)
