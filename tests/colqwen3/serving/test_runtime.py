"""The serving runtime against golden embeddings of the publisher's code, and of transformers."""

import dataclasses
import functools
import gc
import json
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from colqwen3.embedding.batches import embed
from colqwen3.inspection import inspect_folder
from colqwen3.model.loading import load_model
from colqwen3.serving import Runtime, int8, load_runtime
from colqwen3.serving.fused import PLAIN, int8_operations
from colqwen3.serving.gate_features import alternating
from colqwen3.serving.runtime import Mode, page_positions
from tests.helpers.golden import STEMS, golden_page
from tests.helpers.rounded import rounded

GOLDEN = Path("tests/golden")
META = json.loads((GOLDEN / "golden_meta.json").read_text())
EMBEDDINGS = load_file(GOLDEN / "golden.safetensors")
QUERIES: dict[str, str] = json.loads((GOLDEN / "inputs/queries.json").read_text())
PAGES = STEMS
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def page(stem: str) -> Image.Image:
    return golden_page(stem)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return load_runtime(GOLDEN / "model", CPU, torch.float32)


def test_queries_equal_golden_alone_and_together(runtime: Runtime) -> None:
    together = runtime.embed_queries(list(QUERIES.values()))
    for (name, text), vectors in zip(QUERIES.items(), together, strict=True):
        expected = EMBEDDINGS[f"query/{name}"]
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(runtime.embed_queries([text])[0], expected, atol=1e-5, rtol=0)


def test_pages_equal_golden_alone_and_together(runtime: Runtime) -> None:
    together = runtime.embed_pages([page(stem) for stem in PAGES])
    assert len({len(vectors) for vectors in together}) > 1, "the batch must need padding"
    for stem, vectors in zip(PAGES, together, strict=True):
        rows = META["pages"][stem].get("rows")
        for actual in (vectors, runtime.embed_pages([page(stem)])[0]):
            remaining = actual if rows is None else actual[rows]
            torch.testing.assert_close(remaining, EMBEDDINGS[f"page/{stem}"], atol=1e-5, rtol=0)


def test_a_runtime_that_nobody_holds_is_gone() -> None:
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32)
    runtime.embed_queries(["a text"])
    runtime.embed_pages([page(PAGES[0])])
    gone = weakref.ref(runtime._tower), weakref.ref(runtime._decoder)
    gc.disable()  # what is in no cycle goes at once
    try:
        del runtime
        assert [part() for part in gone] == [None, None]
    finally:
        gc.enable()


def raises(*_: object) -> torch.Tensor:
    raise OSError("no compiler here")


@pytest.mark.parametrize("name", ["rms_norm", "gate", "add_layer_norm", "rotate_vision", "gelu"])
@pytest.mark.parametrize("broken", [raises, lambda x, *_: x * 0])
def test_a_wrong_or_failing_operation_is_not_used(
    name: str, broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    operations = PLAIN._replace(**{name: broken})
    monkeypatch.setattr("colqwen3.serving.runtime.choose_operations", lambda _: operations)
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32)
    assert "plain torch is used, and slower" in caplog.text
    assert not runtime.runs("graphs")
    name, text = next(iter(QUERIES.items()))
    expected = EMBEDDINGS[f"query/{name}"]
    torch.testing.assert_close(runtime.embed_queries([text])[0], expected, atol=1e-5, rtol=0)


def test_without_a_compiler_plain_torch_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("colqwen3.serving.runtime.choose_operations", raises)
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32, "compiled")
    assert "fail (no compiler here) here: plain torch is used, and slower" in caplog.text
    assert not runtime.runs("compiled")


def test_a_right_operation_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    operations = PLAIN._replace(gelu=lambda x: PLAIN.gelu(x))
    monkeypatch.setattr("colqwen3.serving.runtime.choose_operations", lambda _: operations)
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32, "compiled")
    assert runtime.runs("compiled")
    assert not runtime.runs("graphs")


def unit_cosines(actual: Any, expected: Any) -> torch.Tensor:
    return torch.cat([(a * b).sum(-1) for a, b in zip(actual, expected, strict=True)])


@pytest.mark.parametrize("packed", [False, True])
def test_8_bit_activations_are_near_and_never_a_single_querys(
    packed: bool, quantized: Path
) -> None:
    folder = quantized if packed else GOLDEN / "model"
    plain = load_runtime(folder, CPU, torch.float32)
    served = load_runtime(folder, CPU, torch.float32, activations="int8")
    assert served.activations == "int8"
    text = next(iter(QUERIES.values()))
    assert torch.equal(served.embed_queries([text])[0], plain.embed_queries([text])[0])
    for kind, inputs in (("queries", [text] * 8), ("pages", [page(PAGES[0])])):
        embedded = getattr(served, f"embed_{kind}")(inputs)
        cosines = unit_cosines(embedded, getattr(plain, f"embed_{kind}")(inputs))
        assert 0.99 < cosines.mean() < 0.999999, kind  # rounded, and nothing worse


def test_8_bit_activations_are_those_of_the_linears_alone() -> None:
    """Dequantized activations and weights in plain linears give the same embeddings."""
    served = load_runtime(GOLDEN / "model", CPU, torch.float32, activations="int8")
    plain, exact = (load_runtime(GOLDEN / "model", CPU, torch.float32) for _ in range(2))

    def rounded_values(x: torch.Tensor, weight: torch.Tensor, turn: bool) -> torch.Tensor:
        both = [int8.rotate(part) if turn else part for part in (x, weight)]
        given = [int8.quantize_tokens(part) for part in both]
        dense = [part.codes.double() * part.scales.double()[:, None] for part in given]
        return (dense[0] @ dense[1].T).float()

    layers = []
    for index, layer in enumerate(plain._decoder.layers):
        at = f"vlm.model.language_model.layers.{index}"
        read = load_model(GOLDEN / "model", torch.float32, CPU).state_dict()
        names = {"qkv": [f"self_attn.{part}_proj" for part in "qkv"], "o": ["self_attn.o_proj"],
                 "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}  # fmt: skip
        weights = {
            name: torch.cat([read[f"{at}.{part}.weight"] for part in parts])
            for name, parts in names.items()
        }
        weights["gate_up"] = weights["gate_up"][alternating(len(weights["down"][0]))]
        linears: dict[str, Any] = {
            name: functools.partial(rounded_values, weight=weight, turn=name == "down")
            for name, weight in weights.items()
        }
        layers.append(dataclasses.replace(layer, **linears))
    plain._decoder = dataclasses.replace(plain._decoder, layers=layers)
    pages = [page(PAGES[0])]
    expected = plain.embed_pages(pages)
    losses = 1 - unit_cosines(served.embed_pages(pages), expected).double()
    in_16 = 1 - unit_cosines(exact.embed_pages(pages), expected).double()
    # sums in float32 instead of float64 change which way a value in the middle is rounded
    assert losses.mean() < 0.05 * in_16.mean()
    assert losses.max() < 0.3 * in_16.max()


def nan_gate(base: Any, device: torch.device) -> Any:
    """Give NaN for pages, which the short text of the trial has not."""
    right = int8_operations(base, device)
    return right._replace(gate=lambda x: right.gate(x if len(x) < 30 else x * float("nan")))


@pytest.mark.parametrize(
    "broken", [raises, lambda *_: PLAIN._replace(gate=lambda x: x[:, ::2]), nan_gate]
)
def test_8_bit_activations_that_fail_or_are_wrong_are_not_used(
    broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("colqwen3.serving.runtime.int8_operations", broken)
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32, activations="int8")
    assert runtime.activations == "bfloat16"
    assert "here: 16-bit ones are used" in caplog.text
    expected = load_runtime(GOLDEN / "model", CPU, torch.float32).embed_pages([page(PAGES[0])])
    assert torch.equal(runtime.embed_pages([page(PAGES[0])])[0], expected[0])


def test_using_it_again_forgets_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32, activations="int8")
    runtime._recorded_queries.put("a size", "a recording")  # type: ignore[arg-type]
    runtime._recorded_pages.put("a size", None)
    with monkeypatch.context() as patch:
        patch.setattr("colqwen3.serving.runtime.int8_operations", raises)
        runtime.use("eager")
    said: list[str] = [runtime.activations]
    assert not len(runtime._recorded_queries)
    assert not len(runtime._recorded_pages)
    assert runtime.token_table is None
    runtime.use("eager")  # what failed once may work again
    assert [*said, runtime.activations] == ["bfloat16", "int8"]


def test_more_texts_than_one_batch_keep_their_order(runtime: Runtime) -> None:
    texts = [f"question number {number}" for number in range(70)]
    result = runtime.embed_queries(texts)
    for place in (0, 63, 64, 69):
        alone = runtime.embed_queries([texts[place]])[0]
        torch.testing.assert_close(result[place], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_equals_transformers(quantized: Path, dtype: torch.dtype) -> None:
    runtime = load_runtime(quantized, CPU, dtype)
    model = load_model(quantized, dtype, CPU)
    processor = runtime.processor
    images = [page(stem) for stem in PAGES[:3]]
    pairs = [
        (runtime.embed_queries([text]), embed(model, processor.process_texts([text])))
        for text in QUERIES.values()
    ]
    pairs.append((runtime.embed_pages(images), embed(model, processor.process_images(images))))
    # two orders of the same 16-bit arithmetic agree no better
    minimum = 0.99999 if dtype == torch.float32 else 0.998
    for actual, expected in pairs:
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.shape == theirs.shape
            assert torch.cosine_similarity(ours, theirs, dim=-1).min() > minimum


@needs_gpu
@pytest.mark.parametrize("mode", ["eager", "compiled", "graphs"])
def test_gpu_equals_transformers_in_float32(mode: Mode) -> None:
    gpu = torch.device("cuda")
    runtime = load_runtime(GOLDEN / "model", gpu, torch.float32, mode)
    model = load_model(GOLDEN / "model", torch.float32, gpu)
    processor = runtime.processor
    texts, images = list(QUERIES.values()), [page(stem) for stem in PAGES[:3]]
    queries = embed(model, processor.process_texts(texts))
    pages = embed(model, processor.process_images(images))
    for _ in range(3):  # a recording is made, and replayed
        actual = runtime.embed_queries(texts) + runtime.embed_pages(images)
        for ours, theirs in zip(actual, queries + pages, strict=True):
            assert torch.cosine_similarity(ours.cpu(), theirs, dim=-1).min() > 0.9999
    assert runtime.runs(mode)


@needs_gpu
def test_gpu_is_as_near_to_float32_as_transformers(quantized: Path) -> None:
    gpu = torch.device("cuda")
    runtime = load_runtime(quantized, gpu)
    texts, images = list(QUERIES.values()), [page(stem) for stem in PAGES[:3]]
    processor = runtime.processor
    inputs = (processor.process_texts(texts), processor.process_images(images))
    exact, plain = (
        [torch.cat(embed(load_model(quantized, dtype, gpu), batch)) for batch in inputs]
        for dtype in (torch.float32, torch.bfloat16)
    )
    for _ in range(3):
        actual = (runtime.embed_queries(texts), runtime.embed_pages(images))
        for ours, theirs, expected in zip(map(torch.cat, actual), plain, exact, strict=True):
            off = [
                1 - torch.cosine_similarity(x.cpu(), expected, dim=-1).mean()
                for x in (ours, theirs)
            ]
            assert off[0] < 1.5 * off[1]
    assert runtime.runs("graphs")
    assert runtime.kernel == ("humming" if find_spec("humming") else "dense")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_serves_as_the_first_does(quantized: Path) -> None:
    """While the first one is the process's current one, as for whoever says nothing of it."""
    texts, images = list(QUERIES.values()), [page(stem) for stem in PAGES[:3]]
    first, second = (load_runtime(quantized, f"cuda:{number}") for number in range(2))
    for _ in range(3):
        for embed_all in ("embed_queries", "embed_pages"):
            inputs = texts if embed_all == "embed_queries" else images
            pairs = zip(
                getattr(first, embed_all)(inputs), getattr(second, embed_all)(inputs), strict=True
            )
            assert all(torch.equal(ours.cpu(), theirs.cpu()) for ours, theirs in pairs)
    assert second.runs("graphs")
    assert second.kernel == first.kernel


def test_positions_are_those_of_transformers() -> None:
    model = load_model(GOLDEN / "model", torch.float32, CPU).vlm.model
    for grid, start, after in (((1, 6, 4), 3, 5), ((1, 2, 8), 1, 2), ((1, 4, 4), 4, 7)):
        visual = grid[1] * grid[2] // 4
        types = torch.tensor([[0] * start + [1] * visual + [0] * after])
        expected, _ = model.get_rope_index(
            torch.zeros_like(types), types, image_grid_thw=torch.tensor([grid])
        )
        actual = page_positions(grid, 2, start, types.shape[1])
        assert torch.equal(actual, expected[:, 0])


def test_a_quantized_vision_tower_is_served(tmp_path: Path) -> None:
    demo = Path("demo/model")
    linears = inspect_folder(demo)[0]["linears"]
    folder = rounded(demo, tmp_path, *linears, "vlm.model.visual.blocks.1.mlp.linear_fc2")
    runtime, model = (
        load_runtime(folder, CPU, torch.float32),
        load_model(folder, torch.float32, CPU),
    )
    images = [page(stem) for stem in PAGES[:2]]
    expected = embed(model, runtime.processor.process_images(images))
    for ours, theirs in zip(runtime.embed_pages(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_mode_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32, "graphs")
    assert runtime.mode == "eager"  # a CPU has no CUDA graphs, and no compiled kernels
    assert runtime.runs("eager")
    operations = PLAIN._replace(gelu=lambda x: PLAIN.gelu(x))
    monkeypatch.setattr("colqwen3.serving.runtime.choose_operations", lambda _: operations)
    modes: dict[Mode, Mode] = {"graphs": "compiled", "compiled": "compiled", "eager": "eager"}
    for mode, runs in modes.items():
        runtime.use(mode)
        assert runtime.mode == runs
    monkeypatch.setattr("colqwen3.serving.runtime.choose_operations", raises)
    runtime.use("compiled")
    assert runtime.mode == "eager"


class Replay:
    """A recording as a CPU can make it: the work itself, run anew for each input."""

    def __init__(self, work: Any) -> None:
        self.replay = work


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let a CPU record, and return the shapes of what was recorded."""
    shapes: list[tuple[int, ...]] = []

    def record(_: Runtime, work: Any, inputs: torch.Tensor, *__: object) -> Replay:
        shapes.append(tuple(inputs.shape))
        return Replay(work)

    monkeypatch.setattr(Runtime, "_record", record)
    return shapes


def test_recorded_sizes_of_queries_are_bounded(
    recorded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colqwen3.serving.runtime.RECORDED_QUERIES", 3)
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32)
    runtime.mode = "graphs"
    texts = {n: " ".join(["total"] * n) for n in (1, 11, 21, 31)}
    alone = {
        n: load_runtime(GOLDEN / "model", CPU, torch.float32).embed_queries([t])[0]
        for n, t in texts.items()
    }
    for n in (1, 11, 21, 1, 31, 1, 21, 11):
        (vectors,) = runtime.embed_queries([texts[n]])
        torch.testing.assert_close(vectors, alone[n], atol=1e-5, rtol=0)
        assert len(runtime._recorded_queries) <= 3
    # the second and third use of the first are replays, as is the second of the third size; only
    # the second size was used longest ago when the fourth came
    sizes = [shape[1] for shape in recorded]
    assert len(recorded) == 5
    assert sizes == [*sorted(set(sizes)), sizes[1]]


def test_recorded_sizes_of_pages_are_bounded(
    recorded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colqwen3.serving.runtime.RECORDED_PAGES", 2)
    runtime = load_runtime(GOLDEN / "model", CPU, torch.float32)
    runtime.mode = "graphs"
    images = [Image.linear_gradient("L").resize((64 * n, 128)) for n in (1, 2, 3)]
    for n in (0, 0, 0, 1, 2, 0):  # a size is recorded the second time in a row of uses
        runtime.embed_pages([images[n]])
        assert len(runtime._recorded_pages) <= 2
    assert len(recorded) == 1
    runtime.embed_pages([images[0]])  # it had been forgotten
    assert len(recorded) == 2


def test_pages_seen_first_run_in_the_memory_of_recordings(
    recorded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, ran = load_runtime(GOLDEN / "model", CPU, torch.float32), []

    def run(work: Any, inputs: torch.Tensor) -> torch.Tensor:
        ran.append(tuple(inputs.shape))
        vectors: torch.Tensor = work(inputs)
        return vectors

    monkeypatch.setattr(runtime, "_recorder", SimpleNamespace(run=run))
    runtime.mode = "graphs"
    image = page(PAGES[0])
    expected = load_runtime(GOLDEN / "model", CPU, torch.float32).embed_pages([image])[0]
    for _ in range(3):
        (vectors,) = runtime.embed_pages([image])
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    assert len(ran) == len(recorded) == 1


def test_when_recording_fails_the_mode_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, freed = load_runtime(GOLDEN / "model", CPU, torch.float32), []
    runtime.mode = "graphs"
    monkeypatch.setattr(
        runtime, "_recorder", SimpleNamespace(record=raises, free=lambda: freed.append(True))
    )
    name, text = next(iter(QUERIES.items()))
    (vectors,) = runtime.embed_queries([text])
    torch.testing.assert_close(vectors, EMBEDDINGS[f"query/{name}"], atol=1e-5, rtol=0)
    assert runtime.runs("eager")
    assert freed
    assert "CUDA graphs do not work here (no compiler here)" in caplog.text


def test_an_empty_page_is_named_by_its_number(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=r"^page 2 of 2 is 0 x 0 pixels: it is empty$"):
        runtime.embed_pages([page(PAGES[0]), Image.new("RGB", (0, 0))])


def test_wrong_arguments_are_named(runtime: Runtime) -> None:
    assert runtime.embed_queries([]) == runtime.embed_pages([]) == []
    with pytest.raises(TypeError, match="list of strings"):
        runtime.embed_queries("a text")
    with pytest.raises(TypeError, match="list of PIL images"):
        runtime.embed_pages(["a.png"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="list of PIL images"):
        runtime.embed_pages(page(PAGES[0]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype is 'float32'; give one of torch"):
        load_runtime(GOLDEN / "model", CPU, "float32")  # type: ignore[arg-type]


def test_16_bit_pages_are_not_white(runtime: Runtime) -> None:
    grey = page(PAGES[0]).convert("L")
    deep = grey.convert("I").point(lambda value: value * 257)
    actual, expected = runtime.embed_pages([deep, grey])
    assert torch.cosine_similarity(actual, expected, dim=-1).min() > 0.999
