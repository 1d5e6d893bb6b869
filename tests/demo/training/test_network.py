"""The batched forward that trains the demo model against the ordinary one that everybody runs."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from colqwen3.model.loading import load_model, load_processor
from demo.training.network import Retriever

FOLDER = Path("demo/model")


@torch.inference_mode()
def test_batched_forward_equals_the_ordinary_one() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    trained = Retriever(json.loads((FOLDER / "config.json").read_text()), tokenizer)
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(FOLDER.glob("*.safetensors")):
        weights.update(load_file(shard))
    trained.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    model = load_model(FOLDER, torch.float32, torch.device("cpu"))
    processor = load_processor(FOLDER, 1280)
    image = Image.open(sorted(Path("demo/pages/evaluation/corpus").iterdir())[0]).convert("L")
    image = image.crop((0, 0, 320, 224))
    pixels = torch.tensor(list(image.tobytes())).view(1, 224, 320) / 127.5 - 1
    expected = model(**processor.process_images([image])).embeddings
    torch.testing.assert_close(trained.pages(pixels)[0], expected, atol=1e-5, rtol=0)
    inputs = processor.process_texts(["Which berth did it use?"])
    expected = model(**inputs).embeddings
    torch.testing.assert_close(trained.queries(inputs["input_ids"]), expected, atol=1e-5, rtol=0)


def test_model_is_small_and_in_shards() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20e6
    assert len(list(FOLDER.glob("*.safetensors"))) >= 2
    log = json.loads(Path("metrics/demo_training.json").read_text())
    shapes = [
        tensor.numel() for p in FOLDER.glob("*.safetensors") for tensor in load_file(p).values()
    ]
    assert sum(shapes) == sum(log["parameters"].values())


@pytest.mark.parametrize("name", ["evaluation", "calibration", "evaluation2"])
def test_page_sets_have_several_sizes(name: str) -> None:
    sizes = {Image.open(path).size for path in Path("demo/pages", name, "corpus").iterdir()}
    assert len(sizes) >= 4
