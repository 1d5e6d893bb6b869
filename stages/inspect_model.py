"""Stage `inspect`: what the model is and what quantizing it will give, from headers alone."""

from pathlib import Path

from colqwen3.checkpoint.hub import find_model
from colqwen3.inspection import inspect_folder
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import write_json
from stages.pipeline.params import ModelParams, Sections, load_params
from stages.pipeline.paths import MANIFEST, MODEL_METRICS
from stages.pipeline.stage import claim, stage_parser


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams


def main() -> None:
    """Write artifacts/manifest.json and metrics/model.json."""
    stage_parser("inspect_model", __doc__).parse_args()
    model = load_params(Params).model
    if not Path(model.source).is_dir() and model.revision is None:
        raise UserError(
            f"params.yaml: model.source: there is no folder {model.source}; correct it, or for a "
            "Hub id set model.revision to a commit of 40 hex digits"
        )
    claim("inspect")
    manifest, metrics = inspect_folder(
        find_model(model.source, model.revision, model.trust_remote_code)
    )
    write_json(MANIFEST, {**manifest, "trust_remote_code": model.trust_remote_code})
    write_json(MODEL_METRICS, metrics)


if __name__ == "__main__":
    run(main)
