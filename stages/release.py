"""Stage `release@<recipe>`: the checkpoint as a folder for people who have never seen this project.

Weights, configs, model code, licence, model card, and quantization_metadata.json, which
`colqwen3 verify` checks the folder against. With format gguf, GGUF files and the program that runs
them take the place of weights, configs and model code.
"""

import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from colqwen3.checkpoint.fingerprint import model_files
from colqwen3.checkpoint.headers import weight_files
from colqwen3.checkpoint.layout import vector_width
from colqwen3.release.provenance import (
    FORMAT_VERSION,
    METADATA,
    describe_files,
    layer_table,
    pipeline_commit,
    seal,
    shown_params,
    shown_path,
)
from colqwen3.system.device import choose_device
from colqwen3.system.disk import check_space
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import (
    digest_file,
    expand_user,
    fresh_folder,
    path_is,
    publish_folder,
    read_json,
    write_file,
    write_json,
)
from stages.evaluation.limits import WORSE
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import (
    ComputeParams,
    EmbedParams,
    EvaluateParams,
    ModelParams,
    Sections,
    load_params,
)
from stages.pipeline.paths import (
    CHECKPOINTS,
    MANIFEST,
    MODEL_METRICS,
    QUALITY_METRICS,
    QUANTIZE_METRICS,
    RELEASES,
    VERDICTS,
)
from stages.pipeline.stage import claim, parse_recipe
from stages.publishing.card import (
    REQUIREMENTS,
    describe_calibration,
    describe_fallback,
    describe_method,
    describe_weights,
    licence_of,
    read_source_card,
    suits_vllm,
    write_card,
)
from stages.publishing.engines import (
    BARS,
    RUNTIME_LOSSES,
    RUNTIME_SPEEDS,
    SIZE,
    TRANSFORMERS_VERSIONS,
    VLLM_VERSIONS,
    expected_numbers,
    ship_for_engines,
)
from stages.publishing.formats import export_weights
from stages.publishing.options import ReleaseOptions

FAILED = "FAILED.txt"
QUERY_TOKENS = 768
"""What a context of this many tokens beyond those of a page leaves for a long query."""
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    embed: EmbedParams
    evaluate: EvaluateParams
    compute: ComputeParams
    release: dict[str, ReleaseOptions] = Field(default_factory=dict)


def failed_text(name: str, verdict: dict[str, Any]) -> str:
    """Return the text that marks a released folder whose recipe breaks a limit."""
    breaches = "".join(f"- {line}\n" for line in verdict["breaches"])
    return (
        f"FAILED: the recipe {name} broke these limits and was released all the same.\n{breaches}"
    )


def copy_configs(checkpoint: Path, folder: Path) -> None:
    """Put a checkpoint's files except the weights into another folder."""
    for path in model_files(checkpoint):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)


def copy_licences(source: Path, folder: Path) -> list[str]:
    """Copy the licence files of the source model; return their names."""
    licences = {
        path.name: path
        for pattern in LICENCES
        for path in source.glob(pattern)
        if path.is_file() and path.suffix in ("", ".txt", ".md")
    }
    for name, path in sorted(licences.items()):
        shutil.copyfile(path, folder / name)
    return sorted(licences)


def describe_provenance(
    name: str,
    params: Params,
    quantized: dict[str, Any],
    source_card: dict[str, Any],
    verdict: dict[str, Any],
) -> dict[str, Any]:
    """Return the metadata of how a checkpoint came about, without those of its files.

    Parameters
    ----------
    name
        Of the recipe.
    params
        Of the pipeline.
    quantized
        metrics/quantize/<recipe>.json.
    source_card
        Metadata of the source model's card.
    verdict
        artifacts/gate/<recipe>.json.
    """
    values = quantized["recipe"]["values"]
    config = read_json(CHECKPOINTS / name / "config.json", f"run `dvc repro -f quantize@{name}`")
    shown = params.model_dump(include={"model": True, "embed": True, "evaluate": {"dataset"}})
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "repo": shown_path(params.model.source),
            "on_hub": not path_is(expand_user(params.model.source), Path.is_dir),
            "revision": params.model.revision,
            "manifest_sha256": digest_file(MANIFEST),
            "license": licence_of(source_card),
        },
        "recipe": {"name": name, **quantized["recipe"]},
        **{key: quantized[key] for key in ("end_to_end",) if key in quantized},
        "seed": values.get("seed"),
        "calibration": quantized["calibration"],
        "params": shown_params(shown),
        "format": params.release.get(name, ReleaseOptions()).format,
        "verdict": {key: verdict[key] for key in ("verdict", "reason")},
        "bits": config["quantization_config"]["bits"],
        "layers": layer_table(CHECKPOINTS / name, config),
        "libraries": quantized["libraries"],
        "pipeline": pipeline_commit(),
    }


def model_width(name: str) -> int:
    """Return the numbers in a vector of a recipe's checkpoint."""
    path = CHECKPOINTS / name / "config.json"
    return vector_width(read_json(path, f"run `dvc repro -f quantize@{name}`"))


def card_facts(
    provenance: dict[str, Any],
    metrics: dict[str, Any],
    model: dict[str, Any],
    weight_bits: dict[str, Any],
    licences: list[str],
) -> dict[str, Any]:
    """Return the variables of the card's template; figures come from `metrics`."""
    recipe, params = provenance["recipe"], provenance["params"]
    values, data = recipe["values"], metrics["data"]
    libraries = {"auto-round", "torch", "transformers"} & provenance["libraries"].keys()
    dataset, source = params["evaluate"]["dataset"], Path(provenance["source"]["repo"])
    on_hub = provenance["source"]["on_hub"]
    quantized, unquantized = describe_weights(weight_bits)
    return {
        "recipe": recipe["name"],
        "metrics": metrics,
        "metadata": METADATA,
        "title": f"{source.name if on_hub else '-'.join(source.parts)}-{recipe['name']}",
        "base_model": str(source),
        "on_hub": on_hub,
        "revision": provenance["source"]["revision"],
        "parameters": f"{model['total']['parameters']:,}",
        "bits": provenance["bits"],
        "group_size": values["group_size"],
        "layers": len(provenance["layers"]),
        "format": provenance["format"],
        "requirements": REQUIREMENTS[provenance["format"]],
        "fallback": describe_fallback(recipe),
        "verdict": provenance["verdict"]["verdict"],
        "verdict_reason": provenance["verdict"]["reason"],
        "failed": provenance["verdict"]["verdict"] == WORSE,
        "quantized": quantized,
        "unquantized": unquantized,
        "suits_vllm": suits_vllm(weight_bits),
        "method": describe_method(values, provenance.get("end_to_end")),
        "calibration": describe_calibration(provenance["calibration"]),
        "libraries": ", ".join(
            f"{key} {provenance['libraries'][key]}" for key in sorted(libraries)
        ),
        "max_num_visual_tokens": params["model"]["max_num_visual_tokens"],
        "max_model_len": params["model"]["max_num_visual_tokens"] + QUERY_TOKENS,
        "expected": provenance["expected"],
        "sample_size": SIZE,
        "sample_bars": BARS,
        "vllm_versions": VLLM_VERSIONS,
        "runtime_speeds": RUNTIME_SPEEDS,
        "runtime_losses": RUNTIME_LOSSES,
        "transformers_versions": TRANSFORMERS_VERSIONS.get(provenance["format"]),
        "vector_width": model_width(recipe["name"]),
        "dataset": dataset,
        "measured_on": f"{data['pages']} pages and {data['queries']} queries of {dataset} "
        f"({params['embed']['dtype']})",
        "licence_files": licences,
    }


def main() -> None:
    """Make artifacts/release/<recipe>."""
    from colqwen3.gguf.export import export_gguf
    from stages.publishing.model_code import ship_code, ship_sentence_transformers

    name = parse_recipe("release", __doc__)
    params = load_params(Params)
    claim(f"release@{name}")
    source = find_inspected_model(params.model, read_manifest())
    metrics, quantized, verdict, model = (
        read_json(path, "run `dvc repro`")
        for path in (
            QUALITY_METRICS / f"{name}.json",
            QUANTIZE_METRICS / f"{name}.json",
            VERDICTS / f"{name}.json",
            MODEL_METRICS,
        )
    )
    if not {"recipe", "libraries", "bits"} <= quantized.keys():
        raise UserError(
            f"{QUANTIZE_METRICS / name}.json: does not say how the checkpoint came about; "
            f"run `dvc repro quantize@{name}`"
        )
    source_card = read_source_card(source)
    partial = fresh_folder(RELEASES / name)
    weight_format = params.release.get(name, ReleaseOptions()).format
    limit = params.model.max_num_visual_tokens
    expected = None
    if weight_format == "gguf":
        export_gguf(CHECKPOINTS / name, partial, max_num_visual_tokens=limit)
    else:
        copy_configs(CHECKPOINTS / name, partial)
        size = sum(path.stat().st_size for path in weight_files(CHECKPOINTS / name))
        check_space(partial, size, "the weights")
        export_weights(CHECKPOINTS / name, partial, weight_format)
        ship_code(partial)
        ship_sentence_transformers(partial)
        ship_for_engines(partial, limit)
        device = choose_device(params.compute.device)
        expected = expected_numbers(CHECKPOINTS / name, params.embed.dtype, device, limit)
    licences = copy_licences(source, partial)
    provenance = describe_provenance(name, params, quantized, source_card, verdict)
    provenance["expected"] = expected
    facts = card_facts(provenance, metrics, model, quantized["bits"], licences)
    facts["gguf_bytes"] = f"{sum(path.stat().st_size for path in partial.glob('*.gguf')):,}"
    write_card(partial, source_card, facts)
    if verdict["verdict"] == WORSE:
        write_file(partial / FAILED, failed_text(name, verdict).encode())
    write_json(partial / METADATA, seal({**provenance, **describe_files(partial)}))
    publish_folder(partial, RELEASES / name)


if __name__ == "__main__":
    run(main)
