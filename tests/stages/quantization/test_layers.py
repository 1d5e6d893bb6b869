"""The model layer by layer gives what the whole model gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import BLOCKS
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import UserError
from stages.quantization.layers import load_front, load_layer
from tests.golden.variants import Variant, write_variant

GOLDEN = Path("tests/golden/model")
CPU = torch.device("cpu")


def first_input(model: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    model.get_submodule(BLOCKS)[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    image = Image.linear_gradient("L").resize((160, 128))
    with torch.inference_mode():
        model(**load_processor(GOLDEN, 64).process_images([image]))
    return seen[0]


@pytest.mark.parametrize("variant", ["published", "legacy", "lm_head"])
def test_front_and_layers_are_those_of_the_whole_model(tmp_path: Path, variant: str) -> None:
    source = GOLDEN
    if variant != "published":
        source = tmp_path / "source"
        name: Variant = "legacy" if variant == "legacy" else "lm_head"
        write_variant(name, source)
    whole = load_model(GOLDEN, torch.float32, CPU)
    checkpoint = Checkpoint.read(source)
    front = load_front(checkpoint, torch.float32, CPU)
    assert len(front.get_submodule(BLOCKS)) == 1
    for index, layer in enumerate(whole.get_submodule(BLOCKS)):
        expected = layer.state_dict()
        actual = load_layer(checkpoint, front, index, torch.float32).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert torch.equal(first_input(front), first_input(whole))


def test_layers_with_missing_or_broken_weights_are_refused(tmp_path: Path) -> None:
    golden = Checkpoint.read(GOLDEN)
    front, stored = load_front(golden, torch.float32, CPU), golden.tensors
    name = f"{BLOCKS}.1.mlp.up_proj.weight"
    without = {key: tensor for key, tensor in stored.items() if key != name}
    with pytest.raises(UserError, match=r"Missing key|Error\(s\) in loading"):
        load_layer(Checkpoint(GOLDEN, without), front, 1, torch.float32)
    tensors = load_file(GOLDEN / stored[name].file)
    tensors[name][2, 1] = float("nan")
    save_file(tensors, tmp_path / stored[name].file)
    broken = {key: t for key, t in stored.items() if t.file == stored[name].file}
    broken |= {key: t for key, t in stored.items() if key.startswith(f"{BLOCKS}.1.")}
    for path in GOLDEN.glob("*.safetensors"):
        if path.name != stored[name].file:
            (tmp_path / path.name).symlink_to(path.resolve())
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_layer(Checkpoint(tmp_path, stored), front, 1, torch.float32)
