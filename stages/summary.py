"""Stage `summary`: nDCG@5, loss and changed ranks of the recipes of params.yaml in one plot each."""

from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_json
from stages.evaluation.summary import loss_bars, ndcg_bars, rank_bars
from stages.pipeline.params import Sections, load_params
from stages.pipeline.paths import LOSS_PLOT, NDCG_PLOT, RANK_PLOT, SUMMARIES
from stages.pipeline.stage import claim, stage_parser
from stages.quantization.recipes import Recipe

PLOTTED = {NDCG_PLOT: ndcg_bars, LOSS_PLOT: loss_bars, RANK_PLOT: rank_bars}


class Params(Sections):
    """What this stage reads of params.yaml."""

    recipes: dict[str, Recipe]


def main() -> None:
    """Write metrics/plots/{ndcg,loss,ranks}.json."""
    stage_parser("summary", __doc__).parse_args()
    params = load_params(Params)
    claim("summary")
    summaries = {}
    for recipe in params.recipes:
        path, fix = SUMMARIES / f"{recipe}.json", f"run `dvc repro evaluate@{recipe}`"
        summaries[recipe] = read_json(path, fix)
        try:
            for bars in PLOTTED.values():
                bars({recipe: summaries[recipe]})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: lacks a figure ({error}); {fix}") from None
    for path, bars in PLOTTED.items():
        write_json(path, bars(summaries))


if __name__ == "__main__":
    run(main)
