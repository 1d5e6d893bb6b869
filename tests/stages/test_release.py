"""A released folder in the hands of others: without this project's code, and under its own loaders."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from colqwen3.checkpoint.layout import linears, vision_linears
from colqwen3.dataset.beir import read_dataset
from colqwen3.embedding.embedder import embed_all
from colqwen3.model import ColQwen3, ColQwen3Config, ColQwen3Processor
from colqwen3.model.loading import load_model, load_processor
from colqwen3.model.scoring import max_sim
from colqwen3.mteb_model import ColQwen3Encoder
from colqwen3.release.verify import verify
from stages import release
from stages.evaluation.retrieval import Run, measure
from stages.pipeline.params import load_params
from stages.publishing.model_code import ship_code
from stages.quantization.allocation import Allocation
from stages.release import copy_configs, copy_licences
from stages.tools import upload
from tests.conftest import RECIPE, run_stage, run_stages
from tests.helpers.clone import change
from tests.helpers.metrics import quality, write_json
from tests.helpers.packed import load_packed
from tests.helpers.rounded import allocated
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
    facts, embedded = probe(Path(sys.executable), released, inputs, tmp_path)
    assert facts["classes"] == ["modeling_colqwen3", "processing_colqwen3"]
    assert facts["architecture"] == "ColQwen3"
    assert len(embedded) == len(QUERIES) + len(PAGES) + 1
    # our loaders run no code of the folder
    for packed in (True, False):
        assert worst_cosine(embedded, own_embeddings(released, inputs, packed)) >= LEAST


def test_the_shipped_code_reads_token_embeddings_and_a_vision_tower_in_few_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "hf"), *sys.path])
    for kind in (ColQwen3, ColQwen3Config, ColQwen3Processor):
        monkeypatch.setattr(kind, "_auto_class", None)  # `ship_code` sets it for good
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads(Path("demo/model/config.json").read_text())
    bits = {**dict.fromkeys(linears(config), 4), **dict.fromkeys(vision_linears(config), 8)}
    allocated(Path("demo/model"), folder, Allocation(bits, 4))
    ship_code(folder)
    shipped: Any = get_class_from_dynamic_module("modeling_colqwen3.ColQwen3", folder)
    assert shipped.__module__.startswith("transformers_modules.")
    model = shipped.from_pretrained(folder, dtype=torch.float32)
    assert type(model.get_input_embeddings()).__module__ == shipped.__module__
    batch = load_processor(folder, 64).process_images([Image.open(PAGES[0])])
    ours = load_model(folder, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        found, expected = (one(**batch).embeddings[0] for one in (model.eval(), ours))
    assert worst_cosine({"page": found}, {"page": expected}) >= LEAST


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
    expected = {f"query/{key}": vectors for key, vectors in zip(QUERIES, queries, strict=True)}
    expected |= {f"page/{p.stem}": vectors for p, vectors in zip(PAGES, documents, strict=True)}
    assert worst_cosine({key: ours[key] for key in expected}, expected) >= LEAST
    scores = max_sim(
        [ours[f"query/{key}"] for key in QUERIES], [ours[f"page/{path.stem}"] for path in PAGES]
    )
    torch.testing.assert_close(
        encoder.similarity(queries, documents).float().cpu(), scores, atol=2e-3, rtol=0
    )


@pytest.fixture
def folder_task(tmp_path: Path) -> Any:
    """Return a task of mteb whose nDCG tells right scores from wrong ones."""
    pytest.importorskip("mteb", reason="the benchmarks are an extra: pip install mteb")
    from tests.helpers.mteb_task import FolderTask, draw_set

    FolderTask.folder = draw_set(tmp_path / "set")
    return FolderTask()


def expected_ndcg(released: Path, folder: Path) -> float:
    dataset = read_dataset(folder)
    model = load_packed(released, torch.float32, torch.device("cpu"))
    processor = load_processor(released, 1280)
    queries, pages = embed_all(model, processor, dataset.queries, dataset.pages, 16, 1280)
    scores = max_sim(list(queries.values()), list(pages.values())).numpy()
    run = Run(tuple(queries), tuple(pages), scores)
    return float(measure(run, dataset.relevance)["ndcg_at_5"].mean())


def test_mtebs_own_wrapper_finishes_a_task(
    released: Path, folder_task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mteb
    from mteb.models.model_implementations.colqwen_models import ColQwen3Wrapper, colqwen3_4b

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        # imported for images that are tensors, which these are not
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    wrapper = ColQwen3Wrapper(str(released), dtype=torch.float32, device="cpu")
    wrapper.mteb_model_meta = colqwen3_4b.model_copy(update={"name": "local/release"})
    result = mteb.evaluate(wrapper, folder_task, cache=None, encode_kwargs={"batch_size": 4})
    (scores,) = result.task_results[0].scores["test"]
    assert scores["ndcg_at_5"] == pytest.approx(
        expected_ndcg(released, folder_task.folder), abs=1e-4
    )
    assert 0.1 < scores["ndcg_at_5"] < 0.99


def test_mteb_evaluates_it_through_sentence_transformers(released: Path, folder_task: Any) -> None:
    import mteb
    from mteb.models import MultiVectorWrapper

    wrapper = MultiVectorWrapper(
        str(released), device="cpu", trust_remote_code=True, model_kwargs={"dtype": torch.float32}
    )
    # mteb reads the modalities of a repository on the Hub; of a folder it supposes text alone
    known = {"name": "local/release", "modalities": ["image", "text"]}
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update=known)
    result = mteb.evaluate(wrapper, folder_task, cache=None, encode_kwargs={"batch_size": 4})
    (scores,) = result.task_results[0].scores["test"]
    assert scores["ndcg_at_5"] == pytest.approx(
        expected_ndcg(released, folder_task.folder), abs=1e-4
    )


def test_weights_are_the_checkpoints_and_code_of_the_source_stays_behind(
    workspace: Path, released: Path, tmp_path: Path
) -> None:
    checkpoint = workspace / "artifacts/checkpoints/rtn-w4g128"
    before, after = (load_file(each / "model.safetensors") for each in (checkpoint, released))
    before["embedding_proj_layer.before_weight.bias"] = before.pop("embedding_proj_layer.bias")
    assert after.pop("embedding_proj_layer.guard_weight").tolist() == [0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {path.suffix for path in released.iterdir()} <= {
        ".json", ".py", ".md", ".safetensors", ".jinja", "",
    }  # fmt: skip
    copy_configs(checkpoint, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in checkpoint.iterdir()
    } - {"model.safetensors"}


@pytest.mark.parametrize("done", [{}, {"end_to_end": {"kept": False, "loss": {}}}])
def test_the_metadata_say_what_end_to_end_tuning_did(
    done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "read_json", lambda *_: {"quantization_config": {"bits": 4}})
    monkeypatch.setattr(release, "layer_table", lambda *_: [])
    for name in ("digest_file", "pipeline_commit"):
        monkeypatch.setattr(release, name, lambda *_: "some")
    quantized = {"recipe": {"ran": "r", "values": {}}, "calibration": {}, "libraries": {}, **done}
    verdict = {"verdict": "fine", "reason": "none"}
    made = release.describe_provenance("r", load_params(release.Params), quantized, {}, verdict)
    assert {key: made[key] for key in made if key == "end_to_end"} == done


def test_licences_travel(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("LICENSE", "NOTICE.txt", "LICENCE.md", "LICENSE.py", "README.md"):
        (source / name).write_text(name)
    assert copy_licences(source, target) == ["LICENCE.md", "LICENSE", "NOTICE.txt"]
    assert (target / "NOTICE.txt").read_text() == "NOTICE.txt"


def test_a_recipe_that_breaks_a_limit_is_released_marked_failed_if_asked_for(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "root"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("release", "gate"))
    write_json(folder / f"metrics/quality/{RECIPE}.json", quality(page=0.5))
    failed = run_stage(folder, "gate", RECIPE)
    assert failed.returncode == 1
    assert "pages.cosine.mean 0.5 is below gate.min_page_cosine 0.95" in failed.stderr
    refused = run_stage(folder, "release", RECIPE)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"error: artifacts/gate/{RECIPE}.json: ")
    change(folder, "release", value={RECIPE: {"even_if_worse": True}})
    run_stages(folder, ["gate", RECIPE], ["release", RECIPE])
    released = folder / "artifacts/release" / RECIPE
    for name in ("FAILED.txt", "README.md"):
        text = (released / name).read_text()
        assert "FAILED" in text
        assert "pages.cosine.mean 0.5 is below gate.min_page_cosine 0.95" in text
    metadata, problems = verify(released)
    assert problems == []
    assert metadata["verdict"]["verdict"] == "worse"
    monkeypatch.setattr(sys, "argv", ["upload", str(released), "owner/name"])
    upload.main()
    said = capfd.readouterr()
    assert "warning: FAILED: " in said.err
    assert "--include FAILED.txt" in said.out


def test_a_release_within_the_limits_is_not_marked(released: Path) -> None:
    assert not (released / "FAILED.txt").exists()
    text = (released / "README.md").read_text()
    assert "FAILED" not in text
    assert "Verdict: **no measurable loss**" in text


def test_a_release_as_gguf_runs_by_itself(workspace: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "root"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("release"))
    change(folder, "release", value={RECIPE: {"format": "gguf"}})
    run_stages(folder, ["release", RECIPE])
    released = folder / "artifacts/release" / RECIPE
    assert {path.name for path in released.iterdir()} == {
        "LICENSE", "README.md", "mmproj.gguf", "quantization_metadata.json", "run_gguf.py",
        "text.gguf",
    }  # fmt: skip
    metadata, problems = verify(released)
    assert (problems, metadata["format"], metadata["tensors"]) == ([], "gguf", {})
    (code,) = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=released, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < float(done.stdout) < 30
    listed = run_stage(folder, "tools.upload", str(released), "owner/name")
    assert (listed.returncode, "--include mmproj.gguf" in listed.stdout) == (0, True)
    data = bytearray((released / "text.gguf").read_bytes())
    data[-1000] ^= 1
    (released / "text.gguf").write_bytes(data)
    assert verify(released)[1] == ["text.gguf: changed"]
