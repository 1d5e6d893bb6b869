"""Benchmarks by mteb: run by mteb itself, offline, on a small set that our own code measures too."""

import json
import socket
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colqwen3.commands import benchmark_vidore as vidore
from colqwen3.dataset.beir import read_dataset
from colqwen3.embedding.embedder import embed_all
from colqwen3.model.loading import load_model, load_processor
from colqwen3.model.scoring import max_sim
from colqwen3.system.errors import UserError
from stages.evaluation.retrieval import MEASURES, Run, measure
from tests.helpers.cli import execute

mteb = pytest.importorskip("mteb", reason="the benchmarks are an extra: pip install mteb")
from mteb.get_tasks import _TASKS_REGISTRY  # noqa: E402

from tests.helpers.mteb_task import FolderTask, draw_set  # noqa: E402

MODEL = Path("tests/golden/model")


def command(*args: str | Path) -> None:
    execute("benchmark-vidore", *args)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(_TASKS_REGISTRY, "FolderPages", FolderTask)
    FolderTask.folder = draw_set(tmp_path / "set")
    return FolderTask.folder


def test_mteb_and_we_measure_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(vidore, "PAGES_IN_MEMORY", 10)  # so that mteb merges two parts
    out = tmp_path / "out.json"
    command("--model", MODEL, "--tasks", "FolderPages", "--out", out)
    report = json.loads(out.read_text())

    dataset = read_dataset(folder)
    processor = load_processor(MODEL, 1280)
    model = load_model(MODEL, torch.float32, torch.device("cpu"))
    queries, pages = embed_all(model, processor, dataset.queries, dataset.pages, 16, 1280)
    scores = max_sim(list(queries.values()), list(pages.values())).numpy()
    run = Run(tuple(queries), tuple(pages), scores)
    ours = measure(run, dataset.relevance)

    for row, query in enumerate(run.queries):
        expected = dict(zip(run.pages, scores[row].tolist(), strict=True))
        assert FolderTask.runs[query] == pytest.approx(expected, abs=1e-5)
    keys = {"ndcg_at_5": "ndcg_cut_5", "ndcg_at_10": "ndcg_cut_10", "recall_at_5": "recall_5"}
    for name, key in keys.items():
        theirs = [FolderTask.by_query[query][key] for query in run.queries]
        assert theirs == pytest.approx(ours[name].tolist(), abs=1e-6)
        assert sum(theirs) / len(theirs) == pytest.approx(ours[name].mean(), abs=1e-6)
        assert 0 < ours[name].mean() < 1
    assert report == {
        "model": "local/model",
        "revision": None,
        "dtype": "float32",
        "max_num_visual_tokens": 1280,
        "mteb": version("mteb"),
        "tasks": {
            "FolderPages": {
                "test": {"default": {name: round(ours[name].mean(), 5) for name in MEASURES}}
            }
        },
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "VidoreDocVQARetrival"], "Did you mean: 'VidoreDocVQARetrieval'"),
        (["--tasks", "Banking77Classification"], "is not a retrieval task"),
        (["--tasks", "FolderPages", "--model", "no/such/folder"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(UserError) as caught:
        command("--model", MODEL, "--out", out, *args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_data_that_cannot_be_fetched_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, **_: Any) -> None:
        raise ConnectionError("no route\nto the Hub")

    monkeypatch.setattr(FolderTask, "load_data", fail)
    with pytest.raises(UserError, match=r"^FolderPages: .*\(no route\); check the network"):
        command("--model", MODEL, "--tasks", "FolderPages", "--out", tmp_path / "o.json")


def test_a_benchmark_stands_for_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    # mteb's own list of benchmarks takes 10 s to build
    known = {"ViDoRe(v1)": SimpleNamespace(tasks=[FolderTask(), FolderTask()])}
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: known[name])
    actual = vidore.find_tasks(["ViDoRe(v1)", "VidoreShiftProjectRetrieval"])
    names = [task.metadata.name for task in actual]
    assert names == ["FolderPages", "FolderPages", "VidoreShiftProjectRetrieval"]
    with pytest.raises(UserError, match=r"mteb knows no task 'ViDoRe\(v9\)'"):
        vidore.find_tasks(["ViDoRe(v9)"])


def test_without_mteb_the_error_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vidore, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {vidore.MTEB}"):
        command("--model", MODEL, "--tasks", "any", "--out", tmp_path / "o.json")


def test_the_named_version_is_the_tested_one() -> None:
    assert f"mteb=={version('mteb')}" == vidore.MTEB
