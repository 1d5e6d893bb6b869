"""Figures of llama.cpp by hand, and the whole command on two pages."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from colqwen3.dataset.beir import Dataset, read_dataset
from colqwen3.dataset.pages import open_page
from colqwen3.embedding.store import Embeddings, write_embeddings
from colqwen3.gguf.export import export_gguf
from colqwen3.system.errors import UserError
from demo.benchmarks import gguf as bench_gguf

pytest.importorskip("gguf")
run_gguf = pytest.importorskip("colqwen3.gguf.run_gguf", exc_type=ImportError)
DEMO = Path("demo/model")


def test_figures_by_hand() -> None:
    queries = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.0, 1.0]])}
    pages = {"p": torch.tensor([[1.0, 0.0]]), "q": torch.tensor([[0.6, 0.8]])}
    turned = {"p": torch.tensor([[0.6, 0.8]]), "q": torch.tensor([[1.0, 0.0]])}
    dataset = Dataset({"a": "", "b": ""}, {}, {"a": {"p": 1}, "b": {"q": 1}})
    results = bench_gguf.compare(Embeddings(queries, turned), Embeddings(queries, pages), dataset)
    # the wrong page comes first in llama.cpp: 1 / log2(3)
    assert results["ndcg_at_5"] == {"torch": 1.0, "llama.cpp": 0.63093}
    assert results["cosine"]["queries"] == {"minimum": 1.0, "mean": 1.0}
    assert results["cosine"]["pages"] == {"minimum": 0.6, "mean": 0.6}


def test_the_command_writes_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dataset = Path("demo/pages/evaluation"), tmp_path / "dataset"
    (dataset / "corpus").mkdir(parents=True)
    judged = [line.split("\t") for line in (source / "qrels.tsv").read_text().splitlines()]
    stems = ("eval-000", "eval-001")
    rows = [judged[0], *(row for row in judged if row[1] in stems)]
    (dataset / "qrels.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    known = {row[0] for row in rows}
    lines = (source / "queries.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["_id"] in known]
    (dataset / "queries.jsonl").write_text("\n".join(kept) + "\n")
    for stem in stems:
        shutil.copy(source / f"corpus/{stem}.png", dataset / "corpus")

    def run(*models: str) -> None:
        monkeypatch.setattr(
            sys, "argv", ["gguf", *models, "--dataset", str(dataset), "--out", str(out)]
        )
        bench_gguf.main()

    out = tmp_path / "out.json"
    with pytest.raises(UserError, match="is not NAME=FOLDER=EMBEDDINGS"):
        run("first")
    # as if torch had computed them: what is compared is read from a file
    export_gguf(DEMO, tmp_path)
    embedder, content = run_gguf.Embedder(tmp_path, 1), read_dataset(dataset)
    queries = {name: embedder.embed_query(text) for name, text in content.queries.items()}
    pages = {name: embedder.embed_page(open_page(page)) for name, page in content.pages.items()}
    parts = ({k: torch.tensor(v) for k, v in part.items()} for part in (queries, pages))
    write_embeddings(tmp_path / "torch.safetensors", *parts)
    run(f"demo={DEMO}={tmp_path / 'torch.safetensors'}")
    (model,) = json.loads(out.read_text())["models"].values()
    assert model["cosine"]["pages"] == {"minimum": 1.0, "mean": 1.0}
    assert model["ndcg_at_5"]["torch"] == model["ndcg_at_5"]["llama.cpp"] > 0
    assert model["bytes"].keys() == {"mmproj.gguf", "text.gguf"}
    assert all(ratio > 0 for ratio in model["time_to_torch_float32"].values())
