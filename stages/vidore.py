"""Public benchmarks: ViDoRe and other retrieval tasks of mteb, run by mteb on any ColQwen3.

``python -m stages.vidore --model DIR_OR_HUB_ID --tasks NAME... --out FILE.json`` is a command for
users with network, no stage of the pipeline: mteb fetches the data, searches and measures.
"""

import argparse
import logging
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.compute import DTYPES, make_deterministic
from stages.errors import PipelineError, run
from stages.files import write_json
from stages.mteb_model import ColQwen3Encoder, load_registered, register
from stages.params import load_params
from stages.retrieval import MEASURES

logger = logging.getLogger(__name__)

MTEB = "mteb==2.26.24"
PAGES_IN_MEMORY = 500  # 0.8 GB of embeddings of the 4B model; mteb's own default is 50,000


def find_tasks(names: list[str]) -> list[Any]:
    """Return mteb's tasks of these names; the name of a benchmark stands for all of its tasks.

    Raises
    ------
    PipelineError
        If mteb knows no such retrieval task.
    """
    import mteb
    from mteb.abstasks import AbsTaskRetrieval

    tasks: list[Any] = []
    for name in names:
        try:
            # all benchmarks of pages have a version in brackets, no task has
            tasks += mteb.get_benchmark(name).tasks if "(" in name else [mteb.get_task(name)]
        except KeyError as error:
            reason = str(error.args[0]).removeprefix("KeyError: ")
            raise PipelineError(f"mteb knows no task {name!r} ({reason})") from None
    for task in tasks:
        if not isinstance(task, AbsTaskRetrieval):
            raise PipelineError(f"{task.metadata.name}: is no retrieval task; leave it out")
    return tasks


def run_task(encoder: ColQwen3Encoder, task: Any, batch_size: int) -> dict[str, Any]:
    """Let mteb run a task; return its figures by split and subset (as mteb rounds them).

    Raises
    ------
    PipelineError
        If the data of the task cannot be had.
    """
    import mteb
    from mteb.models import SearchEncoderWrapper

    name = task.metadata.name
    try:
        task.load_data()
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and the Hub's client raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PipelineError(
            f"{name}: its data cannot be had ({reason}); check the network, HF_HUB_OFFLINE and HF_TOKEN"
        ) from None
    result = mteb.evaluate(
        SearchEncoderWrapper(encoder, corpus_chunk_size=PAGES_IN_MEMORY),
        task,
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        cache=None,  # it goes by the model's name, and folders of one name may hold any weights
        co2_tracker=False,
        show_progress_bar=False,
    ).task_results[0]
    task.unload_data()
    return {
        split: {
            entry["hf_subset"]: {measure: float(entry[measure]) for measure in MEASURES}
            for entry in entries
        }
        for split, entries in result.scores.items()
    }


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.vidore", description=__doc__)
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", required=True)
    parser.add_argument("--revision", help="commit of a Hub id")
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", required=True,
        help='retrieval tasks of mteb such as VidoreDocVQARetrieval, or benchmarks: "ViDoRe(v2)"',
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.json", required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="default: embed.dtype of params.yaml")
    return parser.parse_args()


def main() -> None:
    """Run the tasks and write their figures, after every task anew: a run may take hours."""
    args = parse_arguments()
    if find_spec("mteb") is None:
        raise PipelineError(f"mteb is not installed; run `pip install {MTEB}`")
    params = load_params()
    dtype = args.dtype or params.embed.dtype
    tasks = find_tasks(args.tasks)
    meta = register(args.model, args.revision, dtype)
    make_deterministic()
    encoder = load_registered(meta)
    figures: dict[str, Any] = {}
    for task in tasks:
        name = task.metadata.name
        figures[name] = run_task(encoder, task, params.embed.queries_per_batch)
        logger.info("%s: %s", name, figures[name])
        report = {
            "model": meta.name,
            "revision": meta.revision,
            "dtype": dtype,
            "max_num_visual_tokens": params.model.max_num_visual_tokens,
            "mteb": version("mteb"),
            "tasks": figures,
        }
        write_json(args.out, report)


if __name__ == "__main__":
    run(main)
