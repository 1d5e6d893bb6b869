"""A released folder in the hands of others: without this project's code, and under its own loaders."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from colqwen3.model.loading import load_processor
from colqwen3.model.scoring import max_sim
from colqwen3.mteb_model import ColQwen3Encoder
from stages.release import copy_checkpoint, copy_licences
from tests.helpers.packed import load_packed
from tests.slow.check_release import LEAST, own_embeddings, probe, worst_cosine

PAGES = sorted(Path("demo/pages/evaluation/corpus").iterdir())[:2]
QUERIES = {"a": "total of the year", "b": "  a longer question with several words in it?\n"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "pages").mkdir()
    for path in PAGES:
        shutil.copyfile(path, folder / "pages" / path.name)
    Image.open(PAGES[0]).crop((0, 0, 210, 90)).save(folder / "pages" / "odd.png")
    (folder / "queries.json").write_text(json.dumps(QUERIES))
    return folder


def test_others_get_the_same_embeddings(released: Path, inputs: Path, tmp_path: Path) -> None:
    import sys

    facts, found = probe(Path(sys.executable), released, inputs, tmp_path)
    assert facts["classes"] == ["modeling_colqwen3", "processing_colqwen3"]
    assert facts["architecture"] == "ColQwen3"
    assert len(found) == len(QUERIES) + len(PAGES) + 1
    # our loaders run no code of the folder
    for packed in (True, False):
        assert worst_cosine(found, own_embeddings(released, inputs, packed)) >= LEAST


def test_our_own_loaders_run_no_code_of_the_folder(released: Path, tmp_path: Path) -> None:
    folder, canary = Path(shutil.copytree(released, tmp_path / "copy")), tmp_path / "canary"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(canary)!r}, 'w').close()\n")
    load_processor(folder, 64)
    load_packed(folder, torch.float32, torch.device("cpu"))
    ColQwen3Encoder("name", source=str(folder))  # mteb's way in
    assert not canary.exists()


def test_sentence_transformers_agree(released: Path, inputs: Path) -> None:
    from sentence_transformers import MultiVectorEncoder

    encoder = MultiVectorEncoder(
        str(released), trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.float32}
    )
    texts, pages = list(QUERIES.values()), [Image.open(path) for path in PAGES]
    queries = encoder.encode_query(texts)
    documents = encoder.encode_document(pages, batch_size=2)
    ours = own_embeddings(released, inputs, packed=True)
    wanted = {f"query/{key}": vectors for key, vectors in zip(QUERIES, queries, strict=True)}
    wanted |= {f"page/{p.stem}": vectors for p, vectors in zip(PAGES, documents, strict=True)}
    assert worst_cosine({key: ours[key] for key in wanted}, wanted) >= LEAST
    scores = max_sim(
        [ours[f"query/{key}"] for key in QUERIES], [ours[f"page/{path.stem}"] for path in PAGES]
    )
    torch.testing.assert_close(
        encoder.similarity(queries, documents).float().cpu(), scores, atol=2e-3, rtol=0
    )


def test_weights_are_links_and_code_of_the_source_stays_behind(
    workspace: Path, released: Path, tmp_path: Path
) -> None:
    checkpoint = workspace / "artifacts/checkpoints/rtn-w4g128"
    assert os.path.samefile(checkpoint / "model.safetensors", released / "model.safetensors")
    assert {path.suffix for path in released.iterdir()} <= {
        ".json", ".py", ".md", ".safetensors", "",
    }  # fmt: skip
    copy_checkpoint(checkpoint, tmp_path, weights=False)
    assert not (tmp_path / "model.safetensors").exists()


def test_licences_travel(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("LICENSE", "NOTICE.txt", "LICENCE.md", "LICENSE.py", "README.md"):
        (source / name).write_text(name)
    assert copy_licences(source, target) == ["LICENCE.md", "LICENSE", "NOTICE.txt"]
    assert (target / "NOTICE.txt").read_text() == "NOTICE.txt"
