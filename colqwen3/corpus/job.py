"""Embedding of a collection into shards: resumed after a kill, shared by several processes."""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from colqwen3.checkpoint.fingerprint import fingerprint, model_files
from colqwen3.corpus.formats import FORMATS, Encoded, Format, encode
from colqwen3.corpus.parquet import parquet
from colqwen3.corpus.shards import PATTERN, Shard, read_state, write_shard
from colqwen3.corpus.sources import Source
from colqwen3.embedding.embedder import Embedder, embed_groups, load_embedder, preparation
from colqwen3.embedding.preparing import default_workers
from colqwen3.model.loading import quantization_config
from colqwen3.system.device import DTYPES, ActivationsKind, device_name, make_deterministic
from colqwen3.system.disk import check_space
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json, write_file, write_json
from colqwen3.system.lock import Lock
from colqwen3.system.progress import Progress
from colqwen3.system.resume import work_key

logger = logging.getLogger(__name__)

# a leading underscore hides them from what reads the folder as one Parquet data set
MANIFEST, ERRORS = "_manifest.json", "_errors.jsonl"
LIBRARIES = ("torch", "transformers", "pillow", "pypdfium2", "pyarrow", "humming-kernels")
PAGE_PROMPT_TOKENS = 11
GPU_BATCH, CPU_BATCH = 5120, 1280  # visual tokens
WRITERS = min(4, os.cpu_count() or 1)
POLL = 2.0
"""Seconds between two looks at what other processes have finished."""


@dataclass(frozen=True)
class CorpusOptions:
    """How a collection is embedded.

    Attributes
    ----------
    format
        Of the vectors, a key of `FORMATS`.
    dtype
        Of the arithmetic, a key of ``DTYPES``; None: bfloat16 on a GPU, float32 on a CPU.
    device
        ``auto``, ``cpu`` or ``cuda``.
    max_num_visual_tokens
        A page is shrunk until it has at most this many.
    visual_tokens_per_batch
        Bound of a batch; None: four large pages on a GPU, one on a CPU.
    pages_per_shard
        Pages of one file. Pages form batches within it, and a kill costs at most some of these.
    workers
        Processes that prepare pages; None: every core but one on a GPU, none on a CPU.
    strict
        Whether a page that cannot be embedded ends the run at once.
    trust_remote_code
        Whether Python files of the model folder may run (its tokenizer's).
    activations
        As of `EmbeddingOptions`.
    """

    format: str = "float16"
    dtype: str | None = None
    device: str = "auto"
    max_num_visual_tokens: int = 1280
    visual_tokens_per_batch: int | None = None
    pages_per_shard: int = 64
    workers: int | None = None
    strict: bool = False
    trust_remote_code: bool = False
    activations: ActivationsKind | None = None


@dataclass(frozen=True)
class Part:
    """Which of several processes this is; each has a GPU of its own and every n-th shard.

    Attributes
    ----------
    rank, ranks
        Its number, from 0, and how many there are.
    local_rank, local_ranks
        The same on this machine.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1


@dataclass(frozen=True)
class Plan:
    """What one output folder holds, and how it is made.

    Attributes
    ----------
    out
        The folder.
    model
        Folder of the model.
    settings
        What determines the vectors beside pages and machine: equal in every run on the folder.
    options
        The options, with nothing left open.
    shards
        All shards.
    """

    out: Path
    model: Path
    settings: Mapping[str, Any]
    options: CorpusOptions
    shards: Sequence[Shard]

    @property
    def format(self) -> Format:
        """That of the vectors."""
        return FORMATS[self.options.format]

    def load(self, device: torch.device) -> Embedder:
        """Load what embeds, by deterministic kernels."""
        make_deterministic()
        wide = self.format.kind == "float32"
        return load_embedder(
            self.model, DTYPES[str(self.options.dtype)], device,
            self.options.max_num_visual_tokens, self.options.trust_remote_code,
            torch.float32 if wide else torch.float16, self.options.activations,
        )  # fmt: skip

    def write(
        self, shard: Shard, key: str, vectors: Mapping[str, torch.Tensor | UserError]
    ) -> list[UserError]:
        """Write a shard of the vectors of its pages; return why some have none."""
        pages = {page.id: self._encode(page, vectors) for page in shard.pages}
        width = int(self.settings["embed_dim"])
        width = width // 8 if self.format.kind == "binary" else width
        write_shard(
            self.out / shard.file, shard, key, pages, self.format.kind, width,
            self.settings["model"], self.settings["recipe"],
        )  # fmt: skip
        return [page for page in pages.values() if isinstance(page, UserError)]

    def _encode(
        self, page: Source, vectors: Mapping[str, torch.Tensor | UserError]
    ) -> Encoded | UserError:
        if page.problem is not None:
            return UserError(page.problem)
        result = vectors[page.id]
        if isinstance(result, UserError):
            return result
        try:
            return encode(result, self.format)
        except UserError as error:
            return UserError(f"{page.id}: {error}")


def model_digest(folder: Path) -> str:
    """Return a SHA-256 of a model folder, wherever it lies; see `fingerprint`."""
    return work_key({path.name: fingerprint(path) for path in model_files(folder)})


def plan_corpus(
    model: Path, pages: Sequence[Source], out: Path, options: CorpusOptions, device: torch.device
) -> Plan:
    """Return what is to be done, with every open option decided.

    Raises
    ------
    UserError
        If the model is no ColQwen3, or pyarrow is not installed.
    """
    parquet()
    on_gpu = device.type == "cuda"
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    batch = options.visual_tokens_per_batch or (GPU_BATCH if on_gpu else CPU_BATCH)
    quantization = quantization_config(model)
    config = read_json(model / "config.json", "give a complete model folder")
    settings = {
        "model": model_digest(model),
        "recipe": None if quantization is None else work_key(quantization),
        "embed_dim": config.get("embed_dim"),
        "format": options.format,
        "dtype": dtype,
        "max_num_visual_tokens": options.max_num_visual_tokens,
        "visual_tokens_per_batch": batch,
        "pages_per_shard": options.pages_per_shard,
        "activations": options.activations,
    }
    decided = CorpusOptions(**{**vars(options), "dtype": dtype, "visual_tokens_per_batch": batch})
    step = options.pages_per_shard
    shards = [
        Shard(number, pages[start : start + step])
        for number, start in enumerate(range(0, len(pages), step))
    ]
    return Plan(out, model, settings, decided, shards)


def embed_corpus(plan: Plan, device: torch.device, part: Part = Part()) -> None:
    """Make the missing shards of this process; the last process to end sums up.

    Raises
    ------
    UserError
        If pages could not be embedded (their number; ``_errors.jsonl`` has the reasons), or the
        folder holds shards of another model, of other options or of more pages.
    """
    lock = Lock(plan.out / f".rank-{part.rank}.lock")
    make_folder(plan.out)
    if not lock.take():
        raise UserError(
            f"{plan.out}: process {lock.holder()} is working on it; wait for it or stop it"
        )
    try:
        start_manifest(plan, device_name(device))
        mine = plan.shards[part.rank :: part.ranks]
        missing = find_missing(plan, mine)
        total = sum(len(shard.pages) for shard in mine)
        left = sum(len(shard.pages) for shard, _ in missing)
        if left < total:
            logger.info("continuing: %d of %d pages are done", total - left, total)
        if missing:
            check_space(plan.out, _bytes_left(plan, left), "the vectors")
            embedder = plan.load(device)
            with Progress("pages", total, total - left) as progress, Writer(plan) as writer:
                for shard, key, vectors in embed_shards(plan, embedder, missing, part):
                    writer.add(shard, key, vectors)
                    progress.advance(len(shard.pages))
    finally:
        lock.release(delete=True)
    wait_for_others(plan)
    if part.rank == 0:
        finish(plan)


def embed_shards(
    plan: Plan, embedder: Embedder, missing: Iterable[tuple[Shard, str]], part: Part
) -> Iterator[tuple[Shard, str, dict[str, torch.Tensor | UserError]]]:
    """Yield shards with the vectors of their pages."""
    workers = plan.options.workers
    if workers is None:
        on_gpu = embedder.device.type == "cuda"
        workers = max(1, default_workers() // part.local_ranks) if on_gpu else 0
    groups = (
        ((shard, key), [(page.id, page.file_page) for page in shard.pages if not page.problem])
        for shard, key in missing
    )
    tokens = plan.options.visual_tokens_per_batch or CPU_BATCH
    prepare = preparation(embedder, workers)
    for (shard, key), vectors in embed_groups(embedder, groups, tokens, prepare):
        yield shard, key, vectors


class Writer:
    """Encodes and writes shards in threads while the next are embedded; use as a context manager.

    Parameters
    ----------
    plan
        The plan; with its option ``strict`` a page without vectors raises.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._threads = ThreadPoolExecutor(WRITERS)
        self._waiting: deque[Future[list[UserError]]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            while self._waiting and kind is None:
                self._take()
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def add(self, shard: Shard, key: str, vectors: Mapping[str, torch.Tensor | UserError]) -> None:
        """Write a shard; wait while as many as there are threads are being written."""
        if self._plan.options.strict:
            for result in vectors.values():
                if isinstance(result, UserError):
                    raise result
        self._waiting.append(self._threads.submit(self._plan.write, shard, key, vectors))
        if len(self._waiting) > WRITERS:
            self._take()

    def _take(self) -> None:
        failed = self._waiting.popleft().result()
        for error in failed:
            if self._plan.options.strict:
                raise error
            logger.warning("%s", error)


def make_folder(out: Path) -> None:
    """Make the folder of the shards, if it is not there.

    Raises
    ------
    UserError
        If that is not possible.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be made ({error.strerror}); give --out a folder where you may write"
        ) from None


def start_manifest(plan: Plan, machine: str) -> None:
    """Write the manifest, or compare it with that of an earlier run; `machine` is for it.

    Raises
    ------
    UserError
        If the folder holds vectors of another model or of other options, or of more pages; or,
        under the option ``strict``, if a file could not give its pages.
    """
    path = plan.out / MANIFEST
    made_by = {"machine": machine, "versions": _versions()}
    if path.exists():
        fix = "give --out a new folder"
        before = read_json(path, fix)
        for key, value in plan.settings.items():
            held = before.get("settings", {}).get(key) if isinstance(before, dict) else None
            if held != value:
                raise UserError(f"{path}: {key} is {held!r} there and {value!r} in this run; {fix}")
        if before.get("made_by") != made_by:
            logger.warning(
                "%s: made on another machine or with other versions; vectors may differ in their "
                "last bits", path,
            )  # fmt: skip
    known = {shard.file for shard in plan.shards}
    for file in sorted(plan.out.glob(PATTERN)):
        if file.name not in known:
            raise UserError(
                f"{file}: is of more pages than the inputs now have; give --out a new folder"
            )
    if plan.options.strict:
        for shard in plan.shards:
            for page in shard.pages:
                if page.problem is not None:
                    raise UserError(page.problem)
    write_json(path, _manifest(plan, made_by, complete=False))


def _manifest(plan: Plan, made_by: Any, complete: bool, **figures: Any) -> dict[str, Any]:
    return {
        "settings": dict(plan.settings),
        "made_by": made_by,
        "pages": sum(len(shard.pages) for shard in plan.shards),
        "shards": len(plan.shards),
        "complete": complete,
        **figures,
    }


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def find_missing(plan: Plan, shards: Iterable[Shard]) -> list[tuple[Shard, str]]:
    """Return the shards that are not there, or are of other pages, each with its key."""
    missing = []
    for shard in shards:
        key, state = shard.key(), read_state(plan.out / shard.file)
        if state is None or state["key"] != key:
            missing.append((shard, key))
    return missing


def wait_for_others(plan: Plan) -> None:
    """Wait until every shard is there; a launcher ends all processes when one of them fails."""
    missing: Sequence[Shard] = plan.shards
    while missing := [shard for shard, _ in find_missing(plan, missing)]:
        logger.info("waiting for %d shards of other processes", len(missing))
        time.sleep(POLL)


def finish(plan: Plan) -> None:
    """Write the list of pages without vectors, and the manifest of the whole collection.

    Raises
    ------
    UserError
        If there are such pages.
    """
    rows, failed, size = 0, [], 0
    for shard in plan.shards:
        path = plan.out / shard.file
        state = read_state(path)
        if state is None:
            raise UserError(f"{path}: is damaged or gone; run the command again")
        rows += state["rows"]
        failed += state["failed"]
        size += path.stat().st_size
    errors = plan.out / ERRORS
    if failed:
        lines = (json.dumps(entry, ensure_ascii=False, sort_keys=True) for entry in failed)
        write_file(errors, "".join(f"{line}\n" for line in lines).encode())
    else:
        errors.unlink(missing_ok=True)
    made_by = read_json(plan.out / MANIFEST, "run the command again")["made_by"]
    figures = {"embedded": rows, "failed": len(failed), "bytes": size}
    write_json(plan.out / MANIFEST, _manifest(plan, made_by, complete=True, **figures))
    for partial in plan.out.glob("*.partial"):  # of a killed process
        partial.unlink(missing_ok=True)
    if failed:
        raise UserError(
            f"{errors}: {len(failed)} of {rows + len(failed)} pages could not be embedded; "
            "replace them and run the command again"
        )


def _bytes_left(plan: Plan, pages: int) -> int:
    """Return an upper bound of the bytes of so many pages."""
    tokens = plan.options.max_num_visual_tokens + PAGE_PROMPT_TOKENS
    width = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}[plan.format.kind]
    numbers = tokens * int(plan.settings["embed_dim"]) // plan.format.pool
    return pages * numbers * width // 8
