"""Run ViDoRe and other retrieval tasks of mteb on any ColQwen3, original or quantized.

mteb fetches the data (this needs a network), searches and measures.
"""

import argparse
import logging
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colqwen3.commands.embed import add_model_options
from colqwen3.system.errors import UserError, first_line
from colqwen3.system.files import write_json

if TYPE_CHECKING:
    from colqwen3.mteb_model import ColQwen3Encoder

logger = logging.getLogger(__name__)

EXAMPLE = "colqwen3 benchmark-vidore --model DIR --tasks VidoreDocVQARetrieval --out figures.json"
MTEB = "mteb==2.26.24"
MEASURES = ("ndcg_at_5", "ndcg_at_10", "recall_at_1", "recall_at_5")
PAGES_IN_MEMORY = 500  # 0.8 GB of embeddings of the 4B model; mteb's own default is 50,000


def find_tasks(names: list[str]) -> list[Any]:
    """Return mteb's tasks of these names; the name of a benchmark stands for all of its tasks.

    Raises
    ------
    UserError
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
            raise UserError(f"mteb knows no task {name!r} ({reason})") from None
    for task in tasks:
        if not isinstance(task, AbsTaskRetrieval):
            raise UserError(f"{task.metadata.name}: is not a retrieval task; leave it out")
    return tasks


def run_task(encoder: "ColQwen3Encoder", task: Any, batch_size: int) -> dict[str, Any]:
    """Let mteb run a task; return its figures by split and subset (as mteb rounds them).

    Raises
    ------
    UserError
        If the data of the task cannot be loaded.
    """
    import mteb
    from mteb.models import SearchEncoderWrapper

    name = task.metadata.name
    try:
        task.load_data()
    except (OSError, ValueError, RuntimeError) as error:  # what datasets and the Hub's client raise
        reason = first_line(error)
        raise UserError(
            f"{name}: its data cannot be loaded ({reason}); check the network, HF_HUB_OFFLINE and HF_TOKEN"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--model", metavar="DIR_OR_HUB_ID", required=True)
    parser.add_argument("--revision", help="commit of a Hub id")
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", required=True,
        help='retrieval tasks of mteb such as VidoreDocVQARetrieval, or benchmarks: "ViDoRe(v2)"',
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.json", required=True)
    add_model_options(parser)


def execute(args: argparse.Namespace) -> None:
    """Run the tasks and write their figures after every task: a run may take hours.

    Raises
    ------
    UserError
        If mteb is not installed, knows no such task, or model or data cannot be fetched.
    """
    if args.out.is_dir():
        args.parser.error("--out must name a file")
    if find_spec("mteb") is None:
        raise UserError(f"mteb is not installed; run `pip install {MTEB}`")
    from colqwen3.embedding.job import EmbeddingOptions
    from colqwen3.mteb_model import load_registered, register
    from colqwen3.system.device import make_deterministic

    options = EmbeddingOptions(
        dtype=args.dtype,
        device=args.device,
        max_num_visual_tokens=args.max_num_visual_tokens,
        trust_remote_code=args.trust_remote_code,
    )
    tasks = find_tasks(args.tasks)
    meta = register(args.model, args.revision, options)
    make_deterministic()
    encoder = load_registered(meta)
    figures: dict[str, Any] = {}
    for task in tasks:
        name = task.metadata.name
        figures[name] = run_task(encoder, task, options.queries_per_batch)
        logger.info("%s: %s", name, figures[name])
        report = {
            "model": meta.name,
            "revision": meta.revision,
            "dtype": options.dtype,
            "max_num_visual_tokens": options.max_num_visual_tokens,
            "mteb": version("mteb"),
            "tasks": figures,
        }
        write_json(args.out, report)
