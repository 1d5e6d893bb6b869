"""Stage `calibrate`: queries and pages as the model's processor makes them, one sample each.

A sample is what one calibration forward takes: batch of one, nothing padded. Every quantization
method has a folder of its own, so that a recipe depends on just the samples that it uses; that of
plain rounding holds none, so that rounding is not done again when they change.
"""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stages.dataset import read_queries
from stages.errors import PipelineError, run
from stages.files import fresh_folder, publish_folder, write_json
from stages.manifest import find_inspected_model, read_manifest
from stages.pages import find_pages, open_page
from stages.params import CalibrationParams, load_params
from stages.paths import CALIBRATION
from stages.progress import track
from stages.samples import INDEX, Origin


def draw(ids: list[str], count: int, key: str, seed: int) -> list[str]:
    """Draw `count` of `ids` without repetition, in the order drawn.

    Raises
    ------
    PipelineError
        If there are fewer; `key` is named as the parameter to lower.
    """
    if count > len(ids):
        raise PipelineError(
            f"params.yaml: {key} is {count}, but the dataset holds {len(ids)}; lower it"
        )
    return random.Random(f"{key} {seed}").sample(sorted(ids), count)


def make_samples(params: CalibrationParams, processor: Any, folder: Path) -> list[Origin]:
    """Write the drawn samples into `folder`, one safetensors file each, and return their origins.

    Every file holds ``input_ids`` and ``attention_mask`` [1, tokens]; a page's also holds
    ``pixel_values`` [patches, values] and ``image_grid_thw`` [1, 3].

    Raises
    ------
    PipelineError
        If the dataset cannot be read or holds fewer items than asked for.
    """
    dataset = Path(params.dataset)
    queries = read_queries(dataset / "queries.jsonl") if params.queries else {}
    pages = find_pages(dataset / "corpus") if params.pages else {}
    chosen = [
        ("query", name)
        for name in draw(list(queries), params.queries, "calibration.queries", params.seed)
    ]
    chosen += [
        ("page", name) for name in draw(list(pages), params.pages, "calibration.pages", params.seed)
    ]
    origins = []
    for number, (kind, name) in enumerate(track(chosen, "calibration samples", len(chosen))):
        if kind == "query":
            inputs, origin = processor.process_texts([queries[name]]), name
        else:
            inputs, origin = processor.process_images([open_page(pages[name])]), pages[name].name
        file = f"sample-{number:05d}.safetensors"
        save_file({key: value.contiguous() for key, value in inputs.items()}, folder / file)
        origins.append(Origin(kind, origin, inputs["input_ids"].shape[1], file))
    return origins


def main() -> None:
    """Write artifacts/calibration."""
    from stages.colqwen3.loading import load_processor

    params = load_params()
    source = find_inspected_model(params.model, read_manifest())
    processor = load_processor(
        source, params.model.max_num_visual_tokens, params.model.trust_remote_code
    )
    partial = fresh_folder(CALIBRATION)
    for method in ("autoround", "rtn"):
        folder = partial / method
        folder.mkdir()
        origins = make_samples(params.calibration, processor, folder) if method != "rtn" else []
        write_json(folder / INDEX, {"samples": [asdict(origin) for origin in origins]})
    publish_folder(partial, CALIBRATION)


if __name__ == "__main__":
    run(main)
