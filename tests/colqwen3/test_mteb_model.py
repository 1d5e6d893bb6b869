"""The model behind mteb's interface: what goes in, what comes out, and who knows it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from colqwen3.embedding.embedder import Plain
from colqwen3.embedding.job import EmbeddingOptions
from colqwen3.model.scoring import max_sim
from colqwen3.mteb_model import ColQwen3Encoder, load_registered, register

mteb = pytest.importorskip("mteb", reason="the benchmarks are an extra: pip install mteb")

MODEL = Path("tests/golden/model")


class Batches(list[Any]):
    """Batches with the columns of their dataset, as mteb's data loader has them."""

    def __init__(self, rows: list[dict[str, Any]], size: int) -> None:
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        super().__init__({key: [row[key] for row in part] for key in rows[0]} for part in parts)
        self.dataset = Rows(rows)


class Rows(list[Any]):
    @property
    def features(self) -> dict[str, Any]:
        return dict.fromkeys(self[0])


@pytest.fixture(scope="module")
def encoder() -> ColQwen3Encoder:
    return load_registered(register(str(MODEL), None, EmbeddingOptions()))


def model_of(encoder: ColQwen3Encoder) -> Any:
    assert isinstance(encoder.embedder, Plain)
    return encoder.embedder.model


def alone(encoder: ColQwen3Encoder, inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model_of(encoder)(**inputs).embeddings[0]
    return result


def test_mteb_takes_it_for_an_encoder(encoder: ColQwen3Encoder) -> None:
    assert isinstance(encoder, mteb.EncoderProtocol)


def test_mteb_finds_it_by_name(encoder: ColQwen3Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = mteb.get_model_meta("local/model")
    assert meta.name == encoder.mteb_model_meta.name
    assert (meta.model_type, meta.similarity_fn_name.value) == (["late-interaction"], "MaxSim")
    assert not any(str(MODEL.resolve().parent) in str(value) for value in meta.to_dict().values())
    # what else asks for torchvision
    monkeypatch.setattr(type(meta), "_check_requirements", lambda self: None)
    loaded = mteb.get_model("local/model")
    assert isinstance(loaded, ColQwen3Encoder)
    for name, weight in model_of(encoder).state_dict().items():
        assert torch.equal(model_of(loaded).state_dict()[name], weight)


def test_texts_are_embedded_as_queries(encoder: ColQwen3Encoder) -> None:
    texts = ["net revenue", "how is the pump of the boiler vented before winter?", "x", "zwölf"]
    rows = [{"id": text[0], "text": text} for text in texts]
    result = encoder.encode(Batches(rows, 3), batch_size=3, show_progress_bar=False)
    for text, vectors in zip(texts, result, strict=True):
        expected = alone(encoder, encoder.embedder.processor.process_texts([text]))
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_pages_stay_in_order_within_the_budget(
    encoder: ColQwen3Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(256, 256), (256, 512), (256, 256), (512, 512), (256, 256)]
    images = [Image.effect_noise(size, 60) for size in sizes]
    # a text beside an image is left out
    rows = [{"id": i, "image": image, "text": "t"} for i, image in enumerate(images)]
    monkeypatch.setattr(encoder, "visual_tokens", 260)
    taken: list[int] = []
    process, prompts = (
        encoder.embedder.processor.process_images,
        encoder.embedder.processor.page_prompts,
    )

    def count(grids: Any) -> Any:
        taken.append(len(grids))
        return prompts(grids)

    monkeypatch.setattr(encoder.embedder.processor, "page_prompts", count)
    result = encoder.encode(Batches(rows, 4))
    assert taken == [2, 1, 1, 1]  # 64, 128 | 64 | 256 | 64 tokens, whatever mteb's batches
    for image, vectors in zip(images, result, strict=True):
        expected = alone(encoder, process([image]))
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_similarity_is_maxsim_of_lists_and_of_padded_tensors(encoder: ColQwen3Encoder) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(n, 8, generator=generator) for n in (3, 5)]
    pages = [torch.randn(n, 8, generator=generator) for n in (7, 2)]
    by_loop = torch.tensor([[float((q @ p.T).amax(1).sum()) for p in pages] for q in queries])
    padded = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
    for given in (pages, padded, padded.numpy()):
        torch.testing.assert_close(encoder.similarity(queries, given), by_loop)
    torch.testing.assert_close(encoder.similarity_pairwise(queries, pages), by_loop.diag())
    torch.testing.assert_close(max_sim(queries, pages), by_loop)
