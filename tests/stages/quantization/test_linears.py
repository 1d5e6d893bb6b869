"""The order of layers and the digest of what was filled in; test_quantize.py does the rest."""

from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch

from colqwen3.checkpoint.tensor_file import TensorFile
from colqwen3.system.errors import NonFiniteWeightsError, UserError
from stages.quantization.linears import Job, layer_digest, pack_layer, split_by_layer, write_packed

LAYERS = "vlm.model.language_model.layers"


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = [f"{LAYERS}.{index}.mlp.{part}" for index in (10, 2, 0) for part in ("up", "down")]
    actual = split_by_layer(["vlm.model.visual.merger.linear_fc1", *names])
    assert actual == [names[4:], names[2:4], names[:2]]


def test_digest_sees_a_changed_bit_of_any_part(tmp_path: Path) -> None:
    parts = {
        "qweight": torch.ones(2, 2, dtype=torch.int32),
        "qzeros": torch.ones(1, 2, dtype=torch.int32),
        "scales": torch.ones(1, 2, dtype=torch.float16),
    }
    kinds = {torch.int32: "I32", torch.float16: "F16"}
    specs = {f"a.{key}": (kinds[t.dtype], tuple(t.shape)) for key, t in parts.items()}
    digests = set()
    with TensorFile(tmp_path / "file", specs) as file:
        for changed in (None, *parts):
            result = {key: 2 * t if key == changed else t for key, t in parts.items()}
            write_packed(file, "a", result)
            digests.add(layer_digest(file, ["a"]))
    assert len(digests) == 4


class FakeJob:
    """What `pack_layer` reads of a job."""

    device = torch.device("cpu")

    class allocation:
        linears: ClassVar = {"prefix.linear": 4}

    def weight(self, _: str) -> torch.Tensor:
        return torch.ones(32, 32)


@pytest.mark.parametrize(
    ("gap", "error"),
    [(0.0, None), (0.39, None), (0.41, UserError), (float("nan"), NonFiniteWeightsError)],
)
def test_weights_between_two_codes_are_rejected(gap: float, error: Any) -> None:
    layer: Any = torch.nn.Module()
    layer.linear = torch.nn.Linear(32, 32, bias=False)
    layer.linear.weight.data.fill_(0.5)
    layer.linear.weight.data[0, 3] = 0.5 * (2 + gap)
    layer.linear.scale = torch.full((32, 1), 0.5)
    pack = pack_layer(cast(Job, FakeJob()), layer, "prefix.", ["prefix.linear"])
    if error is None:
        (packed,) = pack
        assert packed[0] == "prefix.linear"
    else:
        with pytest.raises(error):
            list(pack)
