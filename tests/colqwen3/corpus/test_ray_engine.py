"""The job on a local Ray: the bytes of a single process, also when workers are killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from colqwen3.corpus.job import CorpusOptions, Plan, embed_corpus, plan_corpus
from colqwen3.corpus.ray_engine import (
    embed_with_ray,
    pack,
    prepare,
    start_ray,
    to_row,
    to_shard,
    unpack,
)
from colqwen3.corpus.shards import Shard
from colqwen3.corpus.sources import Source, find_sources
from colqwen3.dataset.patches import Cutter, PreparedPage
from colqwen3.system.errors import UserError

MODEL = Path("demo/model").absolute()
CPU = torch.device("cpu")
OPTIONS = CorpusOptions(max_num_visual_tokens=64, pages_per_shard=3)
CUTTER = Cutter(16, 2, 1024, 65536, 3)


def test_prepared_pages_travel_as_bytes() -> None:
    patches = np.arange(96, dtype=np.uint8).reshape(4, 24)
    pages: dict[str, PreparedPage | UserError] = {
        "a": PreparedPage(patches, (1, 2, 2)),
        "b": UserError("b: is empty"),
        "ü": PreparedPage(patches[:2], (1, 1, 2)),
    }
    again = unpack(pack(pages))
    assert list(again) == list(pages)
    assert str(again["b"]) == "b: is empty"
    for name in ("a", "ü"):
        one, other = pages[name], again[name]
        assert isinstance(one, PreparedPage)
        assert isinstance(other, PreparedPage)
        assert one.grid == other.grid
        assert np.array_equal(one.patches, other.patches)
    assert unpack(pack({})) == {}


def test_a_shard_travels_as_a_row(tmp_path: Path) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    shard = Shard(5, [Source("a", str(tmp_path / "a.png")), Source("b", "b.pdf", 2),
                      Source("c", "c.pdf", None, "c.pdf: is damaged")])  # fmt: skip
    row = to_row(shard, "key")
    assert (to_shard(row), row["key"]) == (shard, "key")
    prepared = unpack(prepare(row, CUTTER, os.getcwd())["prepared"])
    assert list(prepared) == ["a", "b"]
    assert isinstance(prepared["a"], PreparedPage)
    assert "b.pdf: cannot be read" in str(prepared["b"])


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^ray is not installed; run `pip install 'ray\[data\]"):
        start_ray("auto")
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    from colqwen3.corpus.ray_engine import RAY

    assert f'"{RAY}"' in pyproject.read_text()


def plan_of(folder: Path, out: str, pages: list[Source]) -> Plan:
    return plan_corpus(MODEL, pages, folder / out, OPTIONS, CPU)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local Ray of two CPUs, whose workers import what this process does."""
    ray = pytest.importorskip("ray", reason="Ray is an extra: make test-corpus")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    root = str(Path(__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, *filter(None, sys.path)]))
    ray.init(num_cpus=2, object_store_memory=200 << 20, include_dashboard=False,
             logging_level="error", log_to_driver=False)  # fmt: skip
    yield
    ray.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_actors_make_what_one_process_makes_although_workers_are_killed(
    tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(23):  # large, so that preparing takes a while
        page = Image.effect_noise((900, 1200 + 200 * (number % 3)), 60)
        page.convert("RGB").save(tmp_path / f"in/p{number:02}.png")
    (tmp_path / "in/p05.png").write_bytes(b"none")
    monkeypatch.chdir(tmp_path)  # paths are relative to where the command runs
    pages = find_sources(["in"])
    assert start_ray("auto") == CPU
    with pytest.raises(UserError, match="the Ray cluster has no GPU"):
        start_ray("cuda")
    with pytest.raises(UserError, match=r"1 of 23 pages could not be embedded"):
        embed_corpus(plan_of(tmp_path, "single", pages), CPU)
    killed: list[str] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_workers, args=(tmp_path / "ray", killed, stop))
    killer.start()
    try:
        with pytest.raises(UserError, match=r"1 of 23 pages could not be embedded"):
            embed_with_ray(plan_of(tmp_path, "ray", pages), CPU, 2)
    finally:
        stop.set()
        killer.join()
    assert killed == ["prepare", "Embed"], "no worker was killed"
    assert contents(tmp_path / "ray") == contents(tmp_path / "single")
    entry = json.loads((tmp_path / "ray/_errors.jsonl").read_text())
    assert entry["id"].endswith("p05.png")


def kill_workers(out: Path, killed: list[str], stop: threading.Event) -> None:
    """Kill a task that prepares, and an actor that embeds once a shard is there."""
    for what, name in (
        ("prepare", r"^ray::Map\(prepare\)"),
        ("Embed", r"^ray::MapWorker\(Map\(Embed"),
    ):
        while not stop.is_set():
            ready = what == "prepare" or list(out.glob("*.parquet"))
            found = subprocess.run(
                ["pgrep", "-f", name], capture_output=True, text=True
            ).stdout.split()  # fmt: skip
            if ready and found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(found[0]), signal.SIGKILL)
                    killed.append(what)
                    break
            time.sleep(0.01)
