"""Linears of one input are merged, and a folder may lack none of its tensors."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen3.model.configuration_colqwen3 import ColQwen3Config
from colqwen3.serving import fused, linears, weights
from colqwen3.serving.linears import KERNELS, Parts
from colqwen3.serving.weights import Weights, build_decoder
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json

GOLDEN, CPU, F32 = Path("tests/golden/model"), torch.device("cpu"), torch.float32
ATTENTION = "vlm.model.language_model.layers.1.self_attn"


def stored() -> dict[str, torch.Tensor]:
    return {k: v for shard in GOLDEN.glob("*.safetensors") for k, v in load_file(shard).items()}


def test_merged_linears_give_their_outputs_in_a_row() -> None:
    names = [f"{ATTENTION}.{part}_proj" for part in "qkv"]
    x, tensors = torch.randn(3, 128), stored()
    actual = Weights(GOLDEN, CPU, F32, {}).merged(*names)(x)
    expected = torch.cat([x @ tensors[f"{name}.weight"].float().T for name in names], 1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_outputs_of_a_gate_alternate(
    mixed: bool, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"vlm.model.language_model.layers.1.mlp.{part}_proj" for part in ("gate", "up")]
    read = Weights(quantized, CPU, F32, read_json(quantized / "config.json", "fetch it"))
    x = torch.randn(3, 128)
    gate, up = (read.merged(name)(x) for name in names)
    if mixed:  # as if their bits differed, which no recipe makes
        right, said = read._bits, iter([4, 8])
        monkeypatch.setattr(read, "_bits", lambda name: next(said, right(name)))
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(fused.gate(read.merged(*names, gate=True)(x)), expected)


@pytest.mark.parametrize("int8", [False, True])
def test_a_kernel_is_told_that_a_gate_follows(
    int8: bool, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, bool]] = []

    def tell(name: str) -> Any:
        def make(*_: Any) -> Any:
            told.append((name, _[-1] is not None))
            return "humming" if name == "choose" else linears.dense(torch.ones(1, 1))

        return make

    monkeypatch.setattr(weights, "choose_kernel", tell("choose"))
    monkeypatch.setattr(weights, "build", tell("build"))
    monkeypatch.setattr(weights, "humming_or_int8", tell("either"))
    monkeypatch.setattr(weights, "streams_int8", lambda *_: True)
    config = read_json(quantized / "config.json", "fetch it")
    build_decoder(Weights(quantized, CPU, F32, config, int8), ColQwen3Config.from_dict(config))
    each = "either" if int8 else "build"
    first = [("choose", False), (each, False)] * 2 + [("choose", True), (each, True)]
    assert told[:7] == [*first, (each, False)]  # `down` has the size of `o` here
    assert set(told[7:]) == {(each, False), (each, True)}


def test_each_size_of_packed_linears_has_a_kernel_of_its_own(
    monkeypatch: pytest.MonkeyPatch, quantized: Path
) -> None:
    tried: list[tuple[int, ...]] = []

    def choose(parts: Parts, *_: Any) -> str:
        tried.append(tuple(parts["qweight"].shape))
        return "dense" if len(tried) == 1 else "another"

    monkeypatch.setattr(weights, "choose_kernel", choose)
    monkeypatch.setitem(KERNELS, "another", KERNELS["dense"])
    read = Weights(quantized, CPU, F32, read_json(quantized / "config.json", "fetch it"))
    assert read.kernel == "dense"
    names = [f"{ATTENTION}.o_proj", f"{ATTENTION.replace('.1.', '.0.')}.o_proj"]
    for name in names:
        read.merged(name)
    read.merged(*(f"{ATTENTION}.{part}_proj" for part in "qkv"))
    assert len(tried) == len(set(tried)) == 2
    assert read.kernel == "dense and another"


def test_legacy_names_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "config.json", folder / "config.json")
    legacy = {name.removeprefix("vlm."): value for name, value in stored().items()}
    legacy["lm_head.weight"] = torch.zeros(2, 2)
    save_file(legacy, folder / "model.safetensors")
    read = Weights(folder, CPU, F32, {})
    name = "vlm.model.language_model.norm.weight"
    assert torch.equal(read.tensor(name), stored()[name].float())
    with pytest.raises(UserError, match=r"lacks the tensor vlm\.lm_head\.weight"):
        read.tensor("vlm.lm_head.weight")
