"""Drawing calibration samples: queries, pages and passages as the processor makes them.

A sample is the input of one calibration forward: a batch of one, nothing padded.
"""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages, open_page
from colqwen3.system.errors import UserError
from colqwen3.system.progress import track
from stages.calibration.sets import CalibrationParams
from stages.quantization.samples import Origin


def draw(ids: Iterable[str], count: int, kind: str, seed: int, key: str) -> list[str]:
    """Draw `count` of `ids` without repetition, in the order drawn.

    The order depends on `kind` and `seed` alone: of two counts with one seed, the smaller draw is
    the beginning of the larger, so that sets differ in what was added and in nothing else.

    Raises
    ------
    UserError
        If there are fewer; `key` is named as the parameter to lower.
    """
    ordered = sorted(ids)
    if count > len(ordered):
        raise UserError(
            f"params.yaml: {key} is {count}, but the dataset holds {len(ordered)}; lower it"
        )
    return random.Random(f"{kind} {seed}").sample(ordered, len(ordered))[:count]


def make_samples(
    params: CalibrationParams, name: str, processor: Any, folder: Path
) -> list[Origin]:
    """Write the samples of set `name` into `folder`, one file each, and return their origins.

    Every safetensors file holds ``input_ids`` and ``attention_mask`` [1, tokens]; a page's also
    holds ``pixel_values`` [patches, values] and ``image_grid_thw`` [1, 3]. A passage is embedded as
    a query is: that is how the model takes documents that are text.

    Raises
    ------
    UserError
        If the dataset cannot be read or holds fewer items than asked for.
    """
    counts, dataset = params.sets[name], Path(params.dataset)
    seed = params.seed if counts.seed is None else counts.seed
    queries = read_queries(dataset / "queries.jsonl") if counts.queries else {}
    pages = find_pages(dataset / "corpus") if counts.pages else {}
    passages = read_queries(dataset / "texts.jsonl") if counts.passages else {}
    texts = {"query": queries, "passage": passages}
    chosen = [
        (kind, item)
        for kind, plural, ids, count in (
            ("query", "queries", queries, counts.queries),
            ("page", "pages", pages, counts.pages),
            ("passage", "passages", passages, counts.passages),
        )
        for item in draw(ids, count, kind, seed, f"calibration.sets.{name}.{plural}")
    ]
    origins = []
    for number, (kind, item) in enumerate(track(chosen, f"samples of {name}", len(chosen))):
        if kind == "page":
            inputs, item = processor.process_images([open_page(pages[item])]), pages[item].name
        else:
            inputs = processor.process_texts([texts[kind][item]])
        file = f"sample-{number:05d}.safetensors"
        save_file({key: value.contiguous() for key, value in inputs.items()}, folder / file)
        origins.append(Origin(kind, item, inputs["input_ids"].shape[1], file))
    return origins
