"""The native model against golden embeddings of an independent one on transformers 4.57.6."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from colqwen3.model import ColQwen3, ColQwen3Config, ColQwen3Processor
from tests.golden.variants import Variant, write_variant
from tests.helpers.golden import STEMS, golden_page

GOLDEN = Path("tests/golden")
META = json.loads((GOLDEN / "golden_meta.json").read_text())
EMBEDDINGS = load_file(GOLDEN / "golden.safetensors")
QUERIES: dict[str, str] = json.loads((GOLDEN / "inputs/queries.json").read_text())


@pytest.fixture(scope="module")
def model() -> ColQwen3:
    loaded: ColQwen3 = ColQwen3.from_pretrained(GOLDEN / "model", dtype=torch.float32).eval()
    return loaded


@pytest.fixture(scope="module")
def processor() -> ColQwen3Processor:
    return ColQwen3Processor.from_pretrained(str(GOLDEN / "model"))


@torch.inference_mode()
def embeddings(model: ColQwen3, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    actual: torch.Tensor = output.embeddings
    return actual


def stored_rows(vectors: torch.Tensor, kind: str, name: str) -> torch.Tensor:
    rows = META[kind][name].get("rows")
    return vectors if rows is None else vectors[rows]


@pytest.mark.parametrize("name", QUERIES)
def test_query_equals_golden(model: ColQwen3, processor: ColQwen3Processor, name: str) -> None:
    actual = embeddings(model, processor.process_texts([QUERIES[name]]))[0]
    torch.testing.assert_close(actual, EMBEDDINGS[f"query/{name}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("stem", STEMS)
def test_page_equals_golden(model: ColQwen3, processor: ColQwen3Processor, stem: str) -> None:
    actual = embeddings(model, processor.process_images([golden_page(stem)]))[0]
    expected = EMBEDDINGS[f"page/{stem}"]
    torch.testing.assert_close(stored_rows(actual, "pages", stem), expected, atol=1e-5, rtol=0)


def test_left_padded_batches_equal_golden_and_pad_with_zeros(
    model: ColQwen3, processor: ColQwen3Processor
) -> None:
    small = [stem for stem in STEMS if META["pages"][stem].get("rows") is None]
    batches = {
        "query": (list(QUERIES), processor.process_texts(list(QUERIES.values()))),
        "page": (small, processor.process_images([golden_page(stem) for stem in small])),
    }
    for kind, (names, inputs) in batches.items():
        actual = embeddings(model, inputs)
        mask = inputs["attention_mask"].bool()
        assert not mask.all(), "the batch must need padding"
        for name, vectors, remaining in zip(names, actual, mask, strict=True):
            expected = EMBEDDINGS[f"{kind}/{name}"]
            torch.testing.assert_close(vectors[remaining], expected, atol=1e-5, rtol=0)
            assert not vectors[~remaining].any()
            assert torch.equal(remaining, remaining.sort().values), "padding belongs on the left"


@pytest.mark.parametrize("variant", ["legacy", "legacy-bare", "lm_head"])
def test_other_key_names_load_the_same_weights(
    model: ColQwen3, tmp_path: Path, variant: Variant
) -> None:
    write_variant(variant, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is ColQwen3
    for (name, expected), (other, actual) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(expected, actual), name


@pytest.mark.parametrize("variant", [None, "legacy"])
def test_saving_gives_published_names_and_reloads_bit_for_bit(
    tmp_path: Path, variant: Variant | None
) -> None:
    source = GOLDEN / "model"
    if variant:
        source = tmp_path / "source"
        write_variant(variant, source)
    loaded = ColQwen3.from_pretrained(source)
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "saved", max_shard_size="500KB")
    index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    published = json.loads((GOLDEN / "model/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == published["weight_map"].keys()
    again = ColQwen3.from_pretrained(tmp_path / "saved")
    for expected, actual in zip(
        loaded.state_dict().values(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, actual)
    assert json.loads((tmp_path / "saved/config.json").read_text())["architectures"] == ["ColQwen3"]


def test_missing_tensor_is_refused_not_invented(tmp_path: Path) -> None:
    write_variant("lm_head", tmp_path)
    shard = next(
        p
        for p in sorted(tmp_path.glob("*.safetensors"))
        if "embedding_proj_layer.bias" in load_file(p)
    )
    tensors = load_file(shard)
    del tensors["embedding_proj_layer.bias"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing.*embedding_proj_layer\.bias"):
        AutoModel.from_pretrained(tmp_path)


def test_rope_of_the_published_config_survives() -> None:
    config = AutoConfig.from_pretrained(GOLDEN / "model")
    raw = json.loads((GOLDEN / "model/config.json").read_text())["text_config"]
    assert type(config) is ColQwen3Config
    assert config.text_config.rope_parameters["rope_theta"] == raw["rope_theta"]
    sections = raw["rope_scaling"]["mrope_section"]
    assert config.text_config.rope_parameters["mrope_section"] == sections


def test_bfloat16_is_close_to_float32(model: ColQwen3, processor: ColQwen3Processor) -> None:
    low = ColQwen3.from_pretrained(GOLDEN / "model", dtype=torch.bfloat16).eval()
    inputs = processor.process_texts([QUERIES["short"]])
    actual = embeddings(low, inputs)
    assert actual.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(actual.float(), embeddings(model, inputs), dim=-1)
    assert cosine.min() > 0.99


def test_auto_classes_give_ours() -> None:
    assert type(AutoModel.from_pretrained(GOLDEN / "model")) is ColQwen3
    assert type(AutoProcessor.from_pretrained(GOLDEN / "model")) is ColQwen3Processor


def test_plain_tuple_on_request(model: ColQwen3, processor: ColQwen3Processor) -> None:
    inputs = processor.process_texts([QUERIES["short"]])
    (actual,) = model(**inputs, return_dict=False)
    assert torch.equal(actual, model(**inputs).embeddings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_keeps_the_frequencies_of_positions(dtype: torch.dtype) -> None:
    model = ColQwen3.from_pretrained(GOLDEN / "model", dtype=torch.float32)
    named = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    before = {name: buffer.clone() for name, buffer in named.items()}
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    after = dict(model.named_buffers())
    assert before
    for name, frequencies in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], frequencies)
