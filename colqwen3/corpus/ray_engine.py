"""The same job on a Ray cluster: pages prepared by CPU tasks, embedded by GPU actors.

Ray Data moves the work, holds back what is too fast, and starts tasks and actors anew when a
process or a machine is lost. A row is a shard, and the bytes of a shard do not depend on who makes
it, so they equal those of a single process. Inputs and output lie on a file system that all
machines share.
"""

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from safetensors.numpy import load, save

from colqwen3.corpus.job import CPU_BATCH, Plan, find_missing, finish, make_folder, start_manifest
from colqwen3.corpus.shards import Shard
from colqwen3.corpus.sources import Source
from colqwen3.dataset.patches import Cutter, PreparedPage
from colqwen3.embedding.embedder import cutter, embed_groups
from colqwen3.embedding.preparing import prepare_or_reason
from colqwen3.model.loading import load_processor
from colqwen3.system.device import device_name
from colqwen3.system.errors import UserError
from colqwen3.system.progress import Progress

logger = logging.getLogger(__name__)

RAY = "ray[data]==2.60.0"
Row = dict[str, Any]
Result = PreparedPage | UserError


def start_ray(device: str) -> torch.device:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start Ray on this machine.

    Parameters
    ----------
    device
        ``auto``: GPUs if the cluster has any, whether or not this machine has one.

    Returns
    -------
    torch.device
        What actors embed on.

    Raises
    ------
    UserError
        If Ray is not installed, or the cluster lacks the GPUs that are asked for.
    """
    try:
        import ray
    except ImportError:
        raise UserError(f"ray is not installed; run `pip install '{RAY}'`") from None
    if not ray.is_initialized():
        ray.init(logging_level="warning", log_to_driver=False)
    gpus = ray.cluster_resources().get("GPU", 0)
    if device == "cuda" and not gpus:
        raise UserError("the device is cuda, but the Ray cluster has no GPU; choose auto or cpu")
    return torch.device("cuda" if gpus and device != "cpu" else "cpu")


def embed_with_ray(plan: Plan, device: torch.device, actors: int) -> None:
    """Make the missing shards on the cluster of `start_ray`.

    Parameters
    ----------
    plan
        From `plan_corpus`.
    device
        ``cuda``: every actor has a GPU of its own.
    actors
        How many embed; with fewer GPUs, Ray starts as many as there are.

    Raises
    ------
    UserError
        As for `embed_corpus`.
    """
    import ray

    make_folder(plan.out)
    on_gpu = device.type == "cuda"
    start_manifest(plan, "GPUs of a Ray cluster" if on_gpu else device_name(device))
    missing = find_missing(plan, plan.shards)
    total = sum(len(shard.pages) for shard in plan.shards)
    left = sum(len(shard.pages) for shard, _ in missing)
    if missing:
        # without a bar of its own: progress is that of the command
        ray.data.DataContext.get_current().enable_progress_bars = False
        processor = load_processor(
            plan.model, plan.options.max_num_visual_tokens, plan.options.trust_remote_code
        )
        rows = [to_row(shard, key) for shard, key in missing]
        here = os.getcwd()
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        data = data.map(
            partial(prepare, cut=cutter(processor), folder=here), num_cpus=1 if on_gpu else 0.4
        )
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=actors)
        # of a CPU both take a part, so that one core suffices, and not the same part: Ray would
        # make a single step of the two
        resources = {"num_gpus": 1} if on_gpu else {"num_cpus": 0.5}
        arguments = (plan, device.type, here)
        data = data.map(Embed, fn_constructor_args=arguments, compute=pool, **resources)
        with Progress("pages", total, total - left) as progress:
            for row in data.iter_rows():
                for reason in json.loads(row["failed"]):
                    if plan.options.strict:
                        raise UserError(reason)
                    logger.warning("%s", reason)
                progress.advance(row["pages"])
    finish(plan)


def to_row(shard: Shard, key: str) -> Row:
    """Return a shard as a row of Ray Data."""
    return {"number": shard.number, "key": key, "pages": json.dumps(shard.pages)}


def to_shard(row: Row) -> Shard:
    """Return the shard of a row."""
    return Shard(row["number"], [Source(*page) for page in json.loads(row["pages"])])


def prepare(row: Row, cut: Cutter, folder: str) -> Row:
    """Read the pages of a shard, paths relative to `folder`, and cut them into patches."""
    os.chdir(folder)
    pages = [page for page in to_shard(row).pages if not page.problem]
    results = {page.id: prepare_or_reason(cut, page.file_page) for page in pages}
    return {**row, "prepared": pack(results)}


class Embed:
    """Embeds prepared shards and writes them; an actor holds one, with a GPU of its own.

    Parameters
    ----------
    plan
        What is to be done.
    device
        ``cpu`` or ``cuda``.
    folder
        What its paths are relative to.
    """

    def __init__(self, plan: Plan, device: str, folder: str) -> None:
        os.chdir(folder)
        self._plan = plan
        self._embedder = plan.load(torch.device(device))

    def __call__(self, row: Row) -> Row:
        """Embed one shard; return its number of pages and why some have no vectors."""
        shard, pages = to_shard(row), unpack(row["prepared"])
        tokens = self._plan.options.visual_tokens_per_batch or CPU_BATCH
        groups = [(shard.number, list(pages.items()))]
        ((_, vectors),) = embed_groups(self._embedder, groups, tokens, iter)
        failed = self._plan.write(shard, row["key"], vectors)
        return {"pages": len(shard.pages), "failed": json.dumps([str(error) for error in failed])}


def pack(pages: Mapping[str, Result]) -> bytes:
    """Return prepared pages as the bytes of a safetensors file."""
    grids, reasons, patches = {}, {}, {}
    for number, page in enumerate(pages.values()):
        if isinstance(page, UserError):
            reasons[number] = str(page)
        else:
            grids[number] = page.grid
            patches[str(number)] = page.patches
    state = json.dumps({"names": list(pages), "grids": grids, "reasons": reasons})
    length = len(state.encode()).to_bytes(8, "little")
    return length + state.encode() + save(patches)


def unpack(data: bytes) -> dict[str, Result]:
    """Return the pages of `pack`."""
    end = 8 + int.from_bytes(data[:8], "little")
    state = json.loads(data[8:end])
    patches = load(data[end:])
    pages: dict[str, Result] = {}
    for number, name in enumerate(state["names"]):
        if (reason := state["reasons"].get(str(number))) is not None:
            pages[name] = UserError(reason)
        else:
            frames, rows, columns = state["grids"][str(number)]
            pages[name] = PreparedPage(patches[str(number)], (frames, rows, columns))
    return pages
