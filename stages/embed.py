"""Stages `embed_original` and `embed@<recipe>`: one vector per token for every query and page."""

from pathlib import Path

from pydantic import Field

from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages
from colqwen3.system.errors import run
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import (
    ComputeParams,
    EmbedParams,
    EvaluateParams,
    ModelParams,
    Sections,
    ServingOptions,
    load_params,
)
from stages.pipeline.paths import CHECKPOINTS, EMBEDDINGS, SCRATCH
from stages.pipeline.stage import claim, code_digest, stage_parser

ORIGINAL = "original"


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    compute: ComputeParams
    embed: EmbedParams
    evaluate: EvaluateParams
    serving: dict[str, ServingOptions] = Field(default_factory=dict)


def main() -> None:
    """Write artifacts/embeddings/<name>.safetensors."""
    # here: a process that prepares pages imports this module too, and needs no torch
    from colqwen3.embedding.job import EmbeddingOptions, embed_to_file

    parser = stage_parser("embed", __doc__)
    parser.add_argument("name", help=f"{ORIGINAL!r}, or a recipe of params.yaml")
    name = parser.parse_args().name
    params = load_params(Params)
    claim(f"embed@{name}")
    original = name == ORIGINAL
    folder = find_inspected_model(params.model, read_manifest()) if original else CHECKPOINTS / name
    dataset = Path(params.evaluate.dataset)
    options = EmbeddingOptions(
        device=params.compute.device,
        max_num_visual_tokens=params.model.max_num_visual_tokens,
        trust_remote_code=params.model.trust_remote_code,
        activations=params.serving[name].activations if name in params.serving else None,
        **params.embed.model_dump(),
    )
    embed_to_file(
        folder,
        read_queries(dataset / "queries.jsonl"),
        find_pages(dataset / "corpus"),
        EMBEDDINGS / f"{name}.safetensors",
        SCRATCH / f"{name}.embed",  # no recipe has a dot in its name
        options,
        code_digest("embed"),
    )


if __name__ == "__main__":
    run(main)
