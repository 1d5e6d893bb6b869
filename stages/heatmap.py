"""Stage `heatmap@<recipe>`: where on a page a query matches, original and quantized side by side.

`python -m stages.heatmap RECIPE` writes ``metrics/plots/<recipe>/heatmap.png``: the query whose
score changed most between original and quantized, on its best relevant page. Each cell of 32 x 32
pixels of the resized page, one visual token, is coloured by the score that the page would get if
it had that token alone, divided by the number of query tokens: the mean cosine of the query's
tokens (the augmentation tokens too, which MaxSim counts) with the cell. Both pictures have one
colour scale, from the median of all their cells to the best.
"""

from pathlib import Path

from colqwen3.dataset.beir import read_dataset
from colqwen3.dataset.pages import open_page
from colqwen3.embedding.store import read_embeddings
from colqwen3.system.errors import run
from colqwen3.system.files import write_file
from stages.evaluation.overlay import picture
from stages.evaluation.similarity import check_names, choose, similarity_map, visual_tokens
from stages.pipeline.params import EvaluateParams, ModelParams, Sections, load_params
from stages.pipeline.paths import CHECKPOINTS, EMBEDDINGS, PLOTS
from stages.pipeline.stage import claim, parse_recipe


class Params(Sections):
    """What this stage reads of params.yaml."""

    model: ModelParams
    evaluate: EvaluateParams


def main() -> None:
    """Write the heat map of one recipe."""
    from colqwen3.model.loading import load_processor

    recipe = parse_recipe("heatmap", __doc__)
    params = load_params(Params)
    claim(f"heatmap@{recipe}")
    dataset = read_dataset(Path(params.evaluate.dataset))
    original = read_embeddings(EMBEDDINGS / "original.safetensors")
    quantized = read_embeddings(EMBEDDINGS / f"{recipe}.safetensors")
    check_names(dataset, original=original, quantized=quantized)
    chosen = choose(dataset, original, quantized)
    processor = load_processor(
        CHECKPOINTS / recipe, params.model.max_num_visual_tokens, params.model.trust_remote_code
    )
    page = open_page(dataset.pages[chosen.page])
    visual, grid = visual_tokens(processor, page)
    maps = [
        similarity_map(vectors.queries[chosen.query], vectors.pages[chosen.page], visual, grid)
        for vectors in (original, quantized)
    ]
    change = chosen.quantized - chosen.original
    captions = (
        f"original: MaxSim {chosen.original:.3f}",
        f"{recipe}: MaxSim {chosen.quantized:.3f} ({change:+.3f})",
    )
    title = f"{recipe}, page {chosen.page}, query {chosen.query}: {dataset.queries[chosen.query]}"
    write_file(PLOTS / recipe / "heatmap.png", picture(page, maps, captions, title))


if __name__ == "__main__":
    run(main)
