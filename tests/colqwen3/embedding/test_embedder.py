"""The one way to embed: the runtime's and the plain vectors agree, whatever the grouping."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from colqwen3.dataset.pages import Page, find_pages
from colqwen3.embedding import embedder
from colqwen3.embedding.embedder import (
    Embedder,
    OnRuntime,
    Plain,
    embed_groups,
    embed_pages,
    embed_texts,
    load_embedder,
    preparation,
)
from colqwen3.model.loading import load_model, load_processor
from colqwen3.serving import load_runtime
from colqwen3.serving.runtime import Mode
from colqwen3.system.errors import UserError

MODEL = Path("tests/golden/model")
CPU = torch.device("cpu")
SIZES = [(64, 96), (96, 64), (64, 96), (128, 128), (64, 96), (96, 64), (64, 96), (64, 64)]
TEXTS = {"a": "total of the year", "b": "x", "c": "how is the pump of the boiler vented?"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 70).save(folder / f"p{number}.png")
    return folder


@pytest.fixture(scope="module")
def plain() -> Plain:
    processor = load_processor(MODEL, 64)
    return Plain(load_model(MODEL, torch.float32, CPU), processor)


@pytest.fixture(scope="module")
def on_runtime() -> OnRuntime:
    return OnRuntime(load_runtime(MODEL, CPU, torch.float32, "eager", 64))


def joined(parts: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: vectors for part in parts for name, vectors in part.items()}


def test_runtime_and_transformers_give_the_same_vectors(
    plain: Plain, on_runtime: OnRuntime, corpus: Path
) -> None:
    pages = find_pages(corpus)
    for expected, actual in (
        (embed_texts(plain, TEXTS, 2), embed_texts(on_runtime, TEXTS, 2)),
        (embed_pages(plain, pages, 200), embed_pages(on_runtime, pages, 200)),
    ):
        one, other = joined(expected), joined(actual)
        assert list(one) == list(other)
        for name in one:
            assert other[name].dtype == torch.float32
            torch.testing.assert_close(other[name], one[name], atol=1e-5, rtol=0)
    assert plain.embed_dim == on_runtime.embed_dim == len(one["p0"][0])


def test_vectors_are_those_of_the_processor_and_the_model(plain: Plain, corpus: Path) -> None:
    pages = find_pages(corpus)
    for name, vectors in joined(embed_pages(plain, pages, 1)).items():  # each page alone
        with Image.open(pages[name].path) as image, torch.inference_mode():
            inputs = plain.processor.process_images([image])
            assert torch.equal(vectors, plain.model(**inputs).embeddings[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtype_rounds_the_same_vectors(
    plain: Plain, on_runtime: OnRuntime, corpus: Path, dtype: torch.dtype
) -> None:
    pages = find_pages(corpus)
    narrow: tuple[tuple[Embedder, Embedder], ...] = (
        (plain, Plain(plain.model, plain.processor, dtype)),
        (on_runtime, OnRuntime(on_runtime.runtime, dtype)),
    )
    for wide, rounded in narrow:
        for one, other in (
            (embed_texts(wide, TEXTS, 2), embed_texts(rounded, TEXTS, 2)),
            (embed_pages(wide, pages, 200), embed_pages(rounded, pages, 200)),
        ):
            expected, actual = joined(one), joined(other)
            assert all(torch.equal(actual[name], expected[name].to(dtype)) for name in expected)


@pytest.mark.parametrize("kind", ["plain", "on_runtime"])
def test_a_group_has_the_same_bits_alone_and_among_others(
    kind: str, corpus: Path, request: pytest.FixtureRequest
) -> None:
    embeds: Embedder = request.getfixturevalue(kind)
    pages = list(find_pages(corpus).items())
    pages[1] = ("p1", Page(corpus / "missing.png"))
    groups = [("x", pages[:3]), ("none", []), ("y", [("bad", Page(corpus / "no.png"))]),
              ("z", pages[3:])]  # fmt: skip
    together = list(embed_groups(embeds, groups, 20, preparation(embeds, 0)))
    assert [group for group, _ in together] == ["x", "none", "y", "z"]
    assert [list(vectors) for _, vectors in together] == [[k for k, _ in g] for _, g in groups]
    for (name, result), group in zip(together, groups, strict=True):
        ((again, alone),) = embed_groups(embeds, [group], 20, preparation(embeds, 0))
        assert again == name
        for key, value in result.items():
            if key in ("p1", "bad"):
                assert isinstance(value, UserError)
                assert ".png: cannot be read" in str(value)
            else:
                other = alone[key]
                assert isinstance(value, torch.Tensor)
                assert isinstance(other, torch.Tensor)
                assert torch.equal(value, other)


def test_pages_of_one_size_are_embedded_together(
    on_runtime: OnRuntime, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[list[int]]] = []
    prompts = on_runtime.processor.page_prompts

    def noted(grids: list[tuple[int, int, int]]) -> object:
        taken.append([list(grid) for grid in grids])
        return prompts(grids)

    monkeypatch.setattr(on_runtime.processor, "page_prompts", noted)
    pages = find_pages(corpus)
    vectors = joined(embed_pages(on_runtime, pages, 10**6))
    assert list(vectors) == list(pages)  # in input order all the same
    (grids,) = taken
    assert grids == sorted(grids, key=lambda grid: (grid[1] * grid[2], grid))
    assert len({tuple(grid) for grid in grids}) > 2


def test_a_damaged_page_ends_a_job(plain: Plain, on_runtime: OnRuntime, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    embedders: tuple[Embedder, ...] = (plain, on_runtime)
    for embeds in embedders:
        with pytest.raises(UserError, match=r"a\.png: is not a PNG or JPEG image"):
            list(embed_pages(embeds, find_pages(tmp_path), 100))


def test_a_cpu_gets_transformers_and_a_gpu_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load_embedder(MODEL, torch.float32, CPU, 64), Plain)
    asked = []

    def fake(folder: Path, device: torch.device, *_: object, **options: object) -> object:
        asked.append((folder, device.type, options))
        return load_runtime(folder, CPU, torch.float32, "eager")

    monkeypatch.setattr("colqwen3.serving.load.load_runtime", fake)
    embeds = load_embedder(MODEL, torch.bfloat16, torch.device("cuda"), 64, True, torch.float16)
    assert isinstance(embeds, OnRuntime)
    assert embeds.output == torch.float16
    options = {
        "max_num_visual_tokens": 64, "trust_remote_code": True, "activations": "bfloat16",
        "time_activations": False,
    }  # fmt: skip
    assert asked == [(MODEL, "cuda", options)]
    assert embedder.GROUP >= 16  # pages of one size need others to go with


def test_activations_are_those_of_the_runtime_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    embeds = load_embedder(MODEL, torch.float32, CPU, 64, activations="int8")
    assert embeds.name == "runtime, dense, int8 activations"

    def fails(*_: object) -> str:
        return "this card is too old"

    monkeypatch.setattr("colqwen3.serving.load.int8_problem", fails)
    with pytest.raises(UserError, match="int8 activations do not work on this machine"):
        load_embedder(MODEL, torch.float32, CPU, 64, activations="int8")
    with pytest.raises(UserError, match="int8 activations need bfloat16 beside them on a GPU"):
        load_embedder(MODEL, torch.float32, torch.device("cuda"), 64, activations="int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_batches_that_overlap_on_a_gpu_are_those_of_single_ones(
    plain: Plain, corpus: Path, mode: Mode
) -> None:
    runtime = load_runtime(MODEL, "cuda", torch.float32, mode, 64)
    embeds = OnRuntime(runtime)
    pages = dict(find_pages(corpus))
    names = [f"{name}-{copy}" for copy in range(6) for name in pages]  # sizes come up again
    many = {name: pages[name.partition("-")[0]] for name in names}
    first = joined(embed_pages(embeds, many, 20))
    second = joined(embed_pages(embeds, many, 20))
    expected = joined(embed_pages(plain, pages, 20))
    for name in names:
        assert torch.equal(first[name], second[name])
        cosine = torch.cosine_similarity(first[name], expected[name.partition("-")[0]], dim=-1)
        assert float(cosine.min()) > 0.9999
    patches = torch.arange(256, dtype=torch.uint8).repeat(4, 3)
    on_cpu = embeds.processor.pixel_values(patches)
    assert torch.equal(embeds.processor.pixel_values(patches.cuda()).cpu(), on_cpu)
