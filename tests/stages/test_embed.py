"""The stage `embed` embeds the evaluation set, with the bounds of params.yaml, under a recipe's name."""

import shutil
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from colqwen3.dataset.beir import read_queries
from colqwen3.dataset.pages import find_pages, open_page
from colqwen3.embedding.embedder import embed_all
from colqwen3.embedding.store import read_embeddings
from colqwen3.model.loading import load_model, load_processor
from colqwen3.serving import load_runtime
from colqwen3.system.device import ActivationsKind
from stages import embed, inspect_model

GOLDEN = Path("tests/golden/model").absolute()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with a small evaluation set and an inspected model."""
    params = YAML(typ="safe").load(Path("params.yaml"))
    params["model"].update(source=str(GOLDEN), max_num_visual_tokens=64)
    params["evaluate"]["dataset"] = "data"
    with (tmp_path / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)
    (tmp_path / "data/corpus").mkdir(parents=True)
    for number in range(2):
        page = Image.linear_gradient("L").resize((64 + 32 * number, 96))
        page.save(tmp_path / f"data/corpus/p{number}.png")
    (tmp_path / "data/queries.jsonl").write_text('{"_id": "q", "text": "total of the year"}\n')
    monkeypatch.chdir(tmp_path)
    inspect_model.main()
    return tmp_path


@pytest.mark.parametrize("name", ["original", "recipe"])
def test_stage_embeds_the_evaluation_set(
    work: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "recipe":
        shutil.copytree(GOLDEN, work / "artifacts/checkpoints/recipe")
    monkeypatch.setattr(sys, "argv", ["embed", name])
    embed.main()
    stored = read_embeddings(work / f"artifacts/embeddings/{name}.safetensors")
    processor = load_processor(GOLDEN, 64)
    model = load_model(GOLDEN, torch.float32, torch.device("cpu"))
    data = work / "data"
    queries, pages = read_queries(data / "queries.jsonl"), find_pages(data / "corpus")
    expected = embed_all(model, processor, queries, pages, 16, 1280)
    for embedded, other in zip((stored.queries, stored.pages), expected, strict=True):
        assert list(embedded) == list(other)
        for item in other:
            torch.testing.assert_close(embedded[item], other[item], atol=1e-5, rtol=0)
    assert not list((work / "artifacts/scratch").glob("*.embed"))


def test_a_recipe_can_be_embedded_as_it_is_served(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(GOLDEN, work / "artifacts/checkpoints/recipe")
    params = YAML(typ="safe").load(Path("params.yaml"))
    params["serving"] = {"recipe": {"activations": "int8"}}
    with Path("params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)
    monkeypatch.setattr(sys, "argv", ["embed", "recipe"])
    embed.main()
    stored = read_embeddings(work / "artifacts/embeddings/recipe.safetensors")
    served, plain = (
        load_runtime(
            GOLDEN, "cpu", torch.float32, max_num_visual_tokens=64, activations=activations
        )
        for activations in get_args(ActivationsKind)[::-1]
    )
    for name, page in find_pages(work / "data/corpus").items():
        (expected,) = served.embed_pages([open_page(page)])
        (other,) = plain.embed_pages([open_page(page)])
        # in another batch a number may be rounded to the next step
        assert (stored.pages[name] - expected).norm() < 0.3 * (stored.pages[name] - other).norm()
        assert (stored.pages[name] - other).norm() > 1e-3


@pytest.mark.parametrize(
    "args", [[], ["original", "--out", "x.safetensors"], ["original", "--model", "tests/golden"]]
)
def test_other_arguments_are_refused(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["embed", *args])
    with pytest.raises(SystemExit) as caught:
        embed.main()
    assert caught.value.code == 2
