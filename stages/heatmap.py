"""Stage `heatmap@<recipe>`: where on a page a query matches, original and quantized side by side.

``metrics/plots/<recipe>/heatmap.png`` has the query whose score changed most between original and
quantized, on its best relevant page. ``artifacts/heatmaps/<recipe>`` has the queries whose result
got worse, each with the first page of both models; ``index.json`` there says which file is which.

Each cell of 32 x 32 pixels of the resized page, one visual token, is coloured by the score that the
page would get if it had that token alone, divided by the number of query tokens: the mean cosine of
the query's tokens (the augmentation tokens too, which MaxSim counts) with the cell. Both pages have
one colour scale, from the median of all their cells to the best.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colqwen3.dataset.beir import Dataset, read_dataset
from colqwen3.dataset.pages import open_page
from colqwen3.embedding.store import Embeddings, open_embeddings
from colqwen3.search.maps import similarity_map, visual_tokens
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import fresh_folder, publish_folder, read_json, write_file, write_json
from stages.evaluation.changes import Result, choose_drawn
from stages.evaluation.overlay import FULL, SMALL, Size, picture
from stages.evaluation.similarity import check_names, choose, score
from stages.pipeline.params import EvaluateParams, ModelParams, Sections, load_params
from stages.pipeline.paths import CHECKPOINTS, EMBEDDINGS, HEATMAPS, PLOTS, QUERY_METRICS
from stages.pipeline.stage import claim, parse_recipe

SIDES = ("original", "quantized")


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    evaluate: EvaluateParams


@dataclass(frozen=True)
class Source:
    """What the pictures of a recipe are drawn from; `embeddings` are those of both `SIDES`."""

    recipe: str
    dataset: Dataset
    embeddings: Mapping[str, Embeddings]
    processor: Any

    def draw(self, query: str, pages: Mapping[str, str], size: Size) -> bytes:
        """Return a query on one page of each side, which may be the same, as a PNG."""
        same = len(set(pages.values())) == 1
        images, maps, scores, captions = [], [], [], []
        for side in SIDES:
            stored, page = self.embeddings[side], pages[side]
            images.append(open_page(self.dataset.pages[page]))
            tokens = stored.queries[query], stored.pages[page]
            maps.append(similarity_map(*tokens, *visual_tokens(self.processor, images[-1])))
            scores.append(score(*tokens))
            name = self.recipe if side == "quantized" else side
            where = "" if same else f"page {page}, "
            captions.append(f"{name}: {where}MaxSim {scores[-1]:.3f}")
        if same:
            captions[1] += f" ({scores[1] - scores[0]:+.3f})"
        shown = " and ".join(dict.fromkeys(pages.values()))
        title = f"{self.recipe}, page {shown}, query {query}: {self.dataset.queries[query]}"
        return picture(images, maps, captions, title, size)


def read_changed(recipe: str, dataset: Dataset) -> list[Result]:
    """Return the queries to draw of a recipe.

    Raises
    ------
    UserError
        If their file is missing, damaged, or of another dataset.
    """
    path, fix = QUERY_METRICS / f"{recipe}.json", f"run `dvc repro evaluate@{recipe}`"
    try:
        results = choose_drawn(read_json(path, fix)["queries"])
        known = all(
            result["query"] in dataset.queries
            and all(result[side]["first"] in dataset.pages for side in SIDES)
            for result in results
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: lacks a result ({error}); {fix}") from None
    if not known:
        raise UserError(f"{path}: is of another dataset; {fix}")
    return results


def main() -> None:
    """Write the heat maps of one recipe."""
    from colqwen3.model.loading import load_processor

    recipe = parse_recipe("heatmap", __doc__)
    params = load_params(Params)
    claim(f"heatmap@{recipe}")
    dataset = read_dataset(Path(params.evaluate.dataset))
    original = open_embeddings(EMBEDDINGS / "original.safetensors")
    quantized = open_embeddings(EMBEDDINGS / f"{recipe}.safetensors")
    check_names(dataset, original=original, quantized=quantized)
    changed = read_changed(recipe, dataset)
    processor = load_processor(
        CHECKPOINTS / recipe, params.model.max_num_visual_tokens, params.model.trust_remote_code
    )
    source = Source(recipe, dataset, {"original": original, "quantized": quantized}, processor)

    most = choose(dataset, original, quantized)
    png = source.draw(most.query, dict.fromkeys(SIDES, most.page), FULL)
    write_file(PLOTS / recipe / "heatmap.png", png)

    partial = fresh_folder(HEATMAPS / recipe)
    index = []
    for number, result in enumerate(changed, 1):
        name = f"{number:02}.png"
        pages = {side: result[side]["first"] for side in SIDES}
        write_file(partial / name, source.draw(result["query"], pages, SMALL))
        index.append({"query": result["query"], "file": name})
    write_json(partial / "index.json", index)
    publish_folder(partial, HEATMAPS / recipe)


if __name__ == "__main__":
    run(main)
