"""A checkpoint whose modules have many widths means the same to everyone who reads it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from colqwen3.checkpoint.layout import BLOCKS, EMBEDDINGS, linears, vision_linears, vision_part
from colqwen3.gguf.export import export_gguf
from colqwen3.gguf.layout import TEXT, VISION_FILE, gguf_files
from colqwen3.model.loading import load_model, load_processor
from colqwen3.release.provenance import layer_table
from colqwen3.serving import load_runtime
from stages.quantization.allocation import Allocation
from tests.helpers.by_hand import dense_weights
from tests.helpers.packed import load_packed
from tests.helpers.rounded import allocated

DEMO, CPU, F32 = Path("demo/model"), torch.device("cpu"), torch.float32
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())
TEXTS = ["total of the year", "list of members"]
Vectors = list[torch.Tensor]


def mixed() -> Allocation:
    """Language model in 4 bits, but for q, k and v of three layers; 8 bits around it."""
    bits = dict.fromkeys(linears(CONFIG), 4)
    for layer, widths in {1: (3, 3, 3), 2: (8, 8, 8), 3: (8, 4, 3)}.items():
        for part, width in zip("qkv", widths, strict=True):
            bits[f"{BLOCKS}.{layer}.self_attn.{part}_proj"] = width
    others = {"attention": 8, "mergers": 8}
    bits |= {n: others[vision_part(n)] for n in vision_linears(CONFIG) if vision_part(n) in others}
    bits["vlm.model.visual.blocks.3.mlp.linear_fc1"] = 4
    return Allocation(bits, 8)


ALLOCATION = mixed()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return allocated(DEMO, tmp_path_factory.mktemp("mixed"), ALLOCATION)


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> dict[str, torch.Tensor]:
    return dense_weights(load_file(folder / "model.safetensors"), ALLOCATION.modules)


def pages() -> list[Image.Image]:
    image = Image.linear_gradient("L")
    return [image.resize((160, 128)), image.rotate(90).resize((96, 160))]


def embed(model: Any) -> Vectors:
    processor = load_processor(DEMO, 64)
    batches = [processor.process_texts([text]) for text in TEXTS]
    batches += [processor.process_images([page]) for page in pages()]
    with torch.inference_mode():
        return [model(**batch).embeddings[0].float() for batch in batches]


@pytest.fixture(scope="module")
def expected(by_hand: dict[str, torch.Tensor]) -> Vectors:
    """Embeddings of the original model given the weights that were read by hand."""
    model = load_model(DEMO, F32, CPU)
    state = model.state_dict()
    assert by_hand.keys() <= state.keys()
    model.load_state_dict({**state, **by_hand})
    return embed(model)


def loss(found: Vectors, expected: Vectors) -> float:
    pairs = zip(found, expected, strict=True)
    return max(
        float(1 - torch.cosine_similarity(one.double(), other.double(), dim=-1).min())
        for one, other in pairs
    )


def test_config_names_every_width_that_is_not_the_usual_one(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    own = config["quantization_config"]["extra_config"]
    assert config["quantization_config"]["bits"] == 4
    assert config["quantized_token_embeddings"] == {"bits": 8, "group_size": 32}
    inside = {name for name in ALLOCATION.text if ALLOCATION.linears[name] != 4}
    assert own.keys() == inside | set(ALLOCATION.vision)
    assert {name: entry["bits"] for name, entry in own.items()} == {
        name: ALLOCATION.linears[name] for name in own
    }


def test_dense_weights_are_those_read_by_hand(
    folder: Path, by_hand: dict[str, torch.Tensor], expected: Vectors
) -> None:
    model = load_model(folder, F32, CPU)
    state = model.state_dict()
    for name, weight in by_hand.items():
        assert torch.equal(state[name], weight), name
    assert loss(embed(model), expected) < 1e-6


def test_auto_round_s_own_loader_agrees(folder: Path, expected: Vectors) -> None:
    assert loss(embed(load_packed(folder, F32, CPU)), expected) < 1e-6


class Replay:
    """A recording as a CPU can make it: the work itself, run anew for each input."""

    def __init__(self, work: Any) -> None:
        self.replay = work


@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_the_runtime_agrees(
    folder: Path, expected: Vectors, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = load_runtime(folder, CPU, F32, max_num_visual_tokens=64)
    recorder = SimpleNamespace(
        record=lambda work, *_: Replay(work), run=lambda work, inputs: work(inputs)
    )
    monkeypatch.setattr(runtime, "_recorder", recorder)
    runtime.mode = mode
    for _ in range(3):  # the first uses of a size are recorded, later ones replayed
        found = [*runtime.embed_queries(TEXTS), *runtime.embed_pages(pages())]
        assert loss(found, expected) < 1e-6
    assert runtime.mode == mode


def test_gguf_blocks_are_those_read_by_hand(
    folder: Path, by_hand: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    export_gguf(folder, tmp_path)
    stored = {
        tensor.name: tensor
        for file in (TEXT, VISION_FILE)
        for tensor in gguf.GGUFReader(tmp_path / file).tensors
    }
    compared = set()
    for part in gguf_files(CONFIG, ALLOCATION.modules).values():
        for tensor in part:
            if tensor.source not in by_hand:
                continue
            made, bits = stored[tensor.name], ALLOCATION.modules[tensor.source[: -len(".weight")]]
            kind = "Q8_0" if bits == 8 else "Q4_0"
            assert made.tensor_type == gguf.GGMLQuantizationType[kind], tensor.name
            values = torch.tensor(gguf.dequantize(made.data, made.tensor_type)).float()
            assert torch.equal(values, by_hand[tensor.source]), tensor.name
            compared.add(tensor.source)
    assert compared == by_hand.keys()


def test_the_table_of_a_release_lists_every_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    table = layer_table(folder, config)
    assert {row["name"]: row["bits"] for row in table} == ALLOCATION.modules
    assert {row["group_size"] for row in table} == {32}
    assert EMBEDDINGS in ALLOCATION.modules
