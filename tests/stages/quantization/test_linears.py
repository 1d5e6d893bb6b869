"""The order of layers and the digest of what was filled in; test_quantize.py does the rest."""

import shutil
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import EMBEDDINGS
from colqwen3.checkpoint.tensor_file import TensorFile
from colqwen3.system.errors import NonFiniteWeightsError, UserError
from colqwen3.system.files import read_json
from colqwen3.system.resume import Scratch
from stages.quantization.allocation import uniform
from stages.quantization.checkpoint import check_checkpoint, make_checkpoint
from stages.quantization.linears import Job, layer_digest, pack_layer, write_packed
from stages.quantization.recipes import RtnRecipe, VisionBits
from tests.helpers.by_hand import dense_weights
from tests.helpers.rounded import allocated

DEMO = Path("demo/model")


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
    [(0.0, None), (0.09, None), (0.11, UserError), (float("nan"), NonFiniteWeightsError)],
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


EVERYTHING = RtnRecipe(
    method="rtn", calibration="none", bits=3, group_size=64, sym=True, token_embeddings=8,
    vision=VisionBits(attention=8, mlp=4, mergers=8),
)  # fmt: skip


def job(source: Path, scratch: Scratch) -> Job:
    allocation = uniform("r", EVERYTHING, read_json(source / "config.json", ""))
    cpu = torch.device("cpu")
    return Job(Checkpoint.read(source), allocation, EVERYTHING, [], cpu, scratch)


@pytest.mark.parametrize("rows", [4096, 100])
def test_every_part_is_rounded_as_it_is_alone(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows of the token embeddings are in memory at a time."""
    monkeypatch.setattr("stages.quantization.linears.TABLE_ROWS", rows)
    with Scratch(tmp_path / "scratch", "key") as scratch:
        work = job(DEMO, scratch)
        folder, filled = make_checkpoint(work)
        check_checkpoint(folder, work)
    (tmp_path / "alone").mkdir()
    alone = allocated(DEMO, tmp_path / "alone", work.allocation, EVERYTHING)
    made, expected = (load_file(path / "model.safetensors") for path in (folder, alone))
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert (folder / "config.json").read_bytes() == (alone / "config.json").read_bytes()

    # errors are Frobenius norms of the whole module
    assert filled.weight_errors.keys() == work.allocation.modules.keys()
    source = {k: v for path in DEMO.glob("*.safetensors") for k, v in load_file(path).items()}
    for name in (EMBEDDINGS, "vlm.model.visual.blocks.2.mlp.linear_fc1"):
        bits = work.allocation.modules[name]
        weight = source[f"{name}.weight"].double()
        difference = dense_weights(made, {name: bits})[f"{name}.weight"].double() - weight
        expected_error = float(difference.norm() / weight.norm())
        assert filled.weight_errors[name] == pytest.approx(expected_error, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e10])
def test_token_embeddings_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    source = Path(shutil.copytree(DEMO, tmp_path / "model"))
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{EMBEDDINGS}.weight" in tensors:
            tensors[f"{EMBEDDINGS}.weight"][2047, 255] = value
            save_file(tensors, path, metadata={"format": "pt"})
    with (
        Scratch(tmp_path / "scratch", "key") as scratch,
        pytest.raises(
            NonFiniteWeightsError, match=r"embed_tokens\.weight holds NaN, infinite or huge"
        ),
    ):
        make_checkpoint(job(source, scratch))
