"""Stage `check`: parameters, datasets and model, before any other stage touches a result.

DVC deletes the outs of a stage before it runs the stage, so a typo that a stage itself found would
have cost a finished result. Every stage depends on this one, whose own out never changes.
"""

import logging
import re
from pathlib import Path

from colqwen3.inspection import read_config
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import expand_user, path_is, write_json
from stages.budget.knapsack import check_fit
from stages.calibration.sets import NO_SAMPLES
from stages.checking.datasets import check_calibration, check_evaluation, unbalanced_sets
from stages.checking.params import Params
from stages.pipeline.params import load_params
from stages.pipeline.paths import CHECKED
from stages.pipeline.stage import claim, stage_parser

logger = logging.getLogger(__name__)

NAMED_FORMAT = re.compile(r"(?:^|-)w(\d)g(\d+)(?:-|$)")
"""What the name of a recipe says of its bits and group size."""


def check_results_folder(folder: Path) -> None:
    """Reject a results folder that is a symbolic link: DVC would refuse it after all the work.

    Raises
    ------
    UserError
        Saying what to do instead.
    """
    if folder.is_symlink():
        raise UserError(
            f"{folder}: is a symbolic link, and DVC tracks nothing outside of the repository; remove "
            "the link, then mount the larger disk there (`mount --bind DISK artifacts`), or move "
            "DVC's cache to it: `dvc cache dir --local DISK` and "
            "`dvc config --local cache.type symlink`"
        )


def check_model(params: Params) -> None:
    """Check a model folder's config, and that every recipe's group size fits its linears.

    A Hub id is checked by `inspect`, which fetches it.

    Raises
    ------
    UserError
        If the folder is not an unquantized ColQwen3, or a group size does not fit.
    """
    folder = expand_user(params.model.source)
    if not path_is(folder, Path.is_dir):
        return
    config = read_config(folder)
    for name, recipe in params.recipes.items():
        try:
            check_fit(name, recipe, config)
        except (KeyError, TypeError, AttributeError, ValueError):
            return  # `inspect` names what is wrong with the config


def misleading_names(params: Params) -> list[str]:
    """Return a line for every recipe whose name contradicts its bits or group size."""
    lines = []
    for name, recipe in params.recipes.items():
        said = NAMED_FORMAT.search(name)
        if said and said.groups() != (str(recipe.bits), str(recipe.group_size)):
            size = f"{recipe.bits:g} bits" if recipe.bits is not None else "a budget of bytes"
            lines.append(
                f"recipes.{name} has {size} and group size {recipe.group_size}, which its name "
                "contradicts; rename it, unless it is for a trial"
            )
    return lines


def main() -> None:
    """Check everything; write artifacts/checked.json."""
    stage_parser("check", __doc__).parse_args()
    check_results_folder(CHECKED.parent)
    params = load_params(Params)
    claim("check")
    check_model(params)
    if params.compute.device == "cuda":  # torch takes seconds to import
        from colqwen3.system.device import choose_device

        choose_device(params.compute.device)
    used = dict.fromkeys(
        recipe.calibration for recipe in params.recipes.values() if recipe.calibration != NO_SAMPLES
    )
    check_calibration(params.calibration)  # all sets are drawn, whoever uses them
    check_evaluation(Path(params.evaluate.dataset))
    for line in (*misleading_names(params), *unbalanced_sets(params.calibration.sets, used)):
        logger.warning("%s", line)
    if Path(params.calibration.dataset).resolve() == Path(params.evaluate.dataset).resolve():
        logger.warning(
            "calibration.dataset and evaluate.dataset are the same folder: every figure is measured "
            "on pages that the recipe was tuned on, and looks better than on others"
        )
    write_json(CHECKED, {"checked": True})


if __name__ == "__main__":
    run(main)
