"""Stage `summary`: nDCG@5 of every recipe of params.yaml in one plot; of removed ones nothing."""

from colqwen3.system.errors import UserError, run
from colqwen3.system.files import read_json, write_json
from stages.evaluation.summary import ndcg_bars
from stages.pipeline.params import Sections, load_params
from stages.pipeline.paths import NDCG_PLOT, SUMMARIES
from stages.pipeline.stage import claim, stage_parser
from stages.quantization.recipes import Recipe


class Params(Sections):
    """What this stage reads of params.yaml."""

    recipes: dict[str, Recipe]


def main() -> None:
    """Write metrics/plots/ndcg.json."""
    stage_parser("summary", __doc__).parse_args()
    params = load_params(Params)
    claim("summary")
    summaries = {}
    for recipe in params.recipes:
        path, fix = SUMMARIES / f"{recipe}.json", f"run `dvc repro evaluate@{recipe}`"
        summaries[recipe] = read_json(path, fix)
        try:
            ndcg_bars({recipe: summaries[recipe]})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: lacks a figure ({error}); {fix}") from None
    write_json(NDCG_PLOT, ndcg_bars(summaries))


if __name__ == "__main__":
    run(main)
