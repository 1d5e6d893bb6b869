"""Quantization against rounding recomputed by hand from the source weights."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stages import quantize
from stages.colqwen3.loading import load_model, load_processor
from stages.errors import PipelineError
from stages.inspect_model import inspect_folder
from stages.params import AutoRoundRecipe, RtnRecipe
from tests.golden.variants import Variant, write_variant

GOLDEN = Path("tests/golden/model")
MANIFEST, METRICS = inspect_folder(GOLDEN)
LINEARS: dict[str, list[int]] = MANIFEST["linears"]
CPU = torch.device("cpu")
RTN = RtnRecipe(method="rtn", calibration="none", bits=4, group_size=128, sym=True)
TUNED = AutoRoundRecipe(
    method="autoround",
    calibration="some",
    bits=4,
    group_size=128,
    sym=True,
    iters=4,
    lr=0.005,
    seed=1,
)


def samples() -> list[quantize.Sample]:
    processor = load_processor(GOLDEN, 64)
    texts = [dict(processor.process_texts([text])) for text in ("net value", "index share")]
    image = Image.linear_gradient("L").resize((128, 192))
    return [*texts, dict(processor.process_images([image]))]


def run_quantize(
    folder: Path,
    recipe: AutoRoundRecipe | RtnRecipe,
    used: list[quantize.Sample],
    source: Path = GOLDEN,
) -> Path:
    scratch, target = folder / "scratch", folder / "target"
    scratch.mkdir(parents=True)
    target.mkdir()
    model = load_model(source, torch.bfloat16, CPU)
    quantize.quantize(model, load_processor(source, 64), recipe, used, scratch, CPU)
    (made,) = scratch.rglob("config.json")
    quantize.collect(made.parent, source, LINEARS, target)
    return target


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(GOLDEN.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


@pytest.fixture(scope="module")
def rtn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_quantize(tmp_path_factory.mktemp("rtn"), RTN, [])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_quantize(tmp_path_factory.mktemp("tuned"), TUNED, samples())


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """Return eight unsigned 4-bit integers a word, lowest bits first, along the first axis."""
    words = packed.astype(np.uint32)
    nibbles = np.stack([(words >> (4 * i)) & 15 for i in range(8)], axis=1)
    return nibbles.reshape(-1, packed.shape[1])


def test_rtn_equals_rounding_by_hand(rtn: Path, source: dict[str, torch.Tensor]) -> None:
    made = load_file(rtn / "model.safetensors")
    for name, (out_features, in_features) in LINEARS.items():
        weight = source[f"{name}.weight"].float().numpy()
        groups = weight.reshape(out_features, in_features // 128, 128)
        most, least = groups.max(-1), groups.min(-1)
        sign = np.where(most >= -least, -1, 1)
        scale = (sign * np.abs(groups).max(-1) / 8).astype(np.float16)
        q = np.clip(np.round(groups / scale[..., None].astype(np.float32)), -8, 7) + 8
        np.testing.assert_array_equal(made[f"{name}.scales"].numpy(), scale.T)
        np.testing.assert_array_equal(
            unpack_nibbles(made[f"{name}.qweight"].numpy()), q.reshape(out_features, -1).T
        )
        assert (unpack_nibbles(made[f"{name}.qzeros"].numpy().T) == 7).all()


@pytest.mark.parametrize("variant", ["legacy", "lm_head"])
def test_other_key_names_give_the_same_checkpoint(
    rtn: Path, tmp_path: Path, variant: Variant
) -> None:
    write_variant(variant, tmp_path / "source")
    made = run_quantize(tmp_path / "made", RTN, [], tmp_path / "source")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (rtn, made))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_rtn_error_is_at_most_a_step(rtn: Path, source: dict[str, torch.Tensor]) -> None:
    made = load_file(rtn / "model.safetensors")
    dense = load_model(rtn, torch.float32, CPU).state_dict()
    for name in LINEARS:
        step = made[f"{name}.scales"].float().abs().repeat_interleave(128, dim=0).T
        error = (dense[f"{name}.weight"] - source[f"{name}.weight"].float()).abs()
        assert (error <= step * 1.001).all()  # half a step, but a whole one where it was clipped
        assert (error <= step / 2 * 1.001).float().mean() > 0.99


@pytest.mark.parametrize("made", ["rtn", "tuned"])
def test_all_but_the_planned_linears_keep_their_bytes(
    made: str, source: dict[str, torch.Tensor], request: pytest.FixtureRequest
) -> None:
    tensors = load_file(request.getfixturevalue(made) / "model.safetensors")
    planned = {f"{name}.weight" for name in LINEARS}
    packed = {f"{name}.{part}" for name in LINEARS for part in ("qweight", "qzeros", "scales")}
    assert tensors.keys() == (source.keys() - planned) | packed
    for name in source.keys() - planned:
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name], source[name])


def test_bytes_are_those_that_inspect_foretold(rtn: Path) -> None:
    counted = quantize.count_bytes(rtn)
    foretold = METRICS["expected_bytes"]["w4g128"]
    assert sum(counted["components"].values()) == foretold
    assert counted["files"] == (rtn / "model.safetensors").stat().st_size


def test_config_keeps_the_published_fields(tuned: Path) -> None:
    before = json.loads((GOLDEN / "config.json").read_text())
    after = json.loads((tuned / "config.json").read_text())
    quantization = after.pop("quantization_config")
    del before["auto_map"]  # names code files that the checkpoint does not hold
    assert after == before
    assert (quantization["bits"], quantization["group_size"]) == (4, 128)
    assert quantization["quant_method"] == "auto-round"
    assert (tuned / "tokenizer.json").read_bytes() == (GOLDEN / "tokenizer.json").read_bytes()
    assert not list(tuned.glob("*.py"))
    named = [path.name for path in tuned.glob("*.json") if "auto_map" in path.read_text()]
    assert not named  # code that is not there


def test_tuning_moves_some_weights(rtn: Path, tuned: Path) -> None:
    plain, made = (load_file(folder / "model.safetensors") for folder in (rtn, tuned))
    moved = [
        np.abs(
            unpack_nibbles(plain[f"{name}.qweight"].numpy()).astype(int)
            - unpack_nibbles(made[f"{name}.qweight"].numpy()).astype(int)
        )
        for name in LINEARS
    ]
    share = np.mean(np.concatenate([m.ravel() for m in moved]) > 0)
    assert 0 < share < 0.5


def test_two_runs_give_equal_bytes(tuned: Path, tmp_path: Path) -> None:
    again = run_quantize(tmp_path, TUNED, samples())
    digests = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (tuned, again)
    ]
    assert digests[0] == digests[1]


def test_lost_calibration_sample_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("autoround"), "disabled", True)
    good = samples()
    broken = {**good[2], "pixel_values": good[2]["pixel_values"][:-4]}
    with pytest.raises(PipelineError, match="3 samples asked for, 3 started, 2 reached"):
        run_quantize(tmp_path / "some", TUNED, [good[0], broken, good[1]])
    with pytest.raises(PipelineError, match="1 samples asked for, 1 started, 0 reached"):
        run_quantize(tmp_path / "none", TUNED, [broken])


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (["a", "b", "c"], "c was quantized but not planned"),
        (["a"], "b was planned but not quantized"),
    ],
)
def test_another_set_of_linears_fails(packed: list[str], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        quantize.check_plan([f"{name}.qweight" for name in packed], {"a": [1, 1], "b": [1, 1]})


def test_changed_tensor_fails() -> None:
    before = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    quantize.check_untouched("x", before, before.float())
    after: Any
    for after in (None, before + 1):
        with pytest.raises(PipelineError, match="x is not planned"):
            quantize.check_untouched("x", before, after)


def test_group_size_must_divide() -> None:
    quantize.check_group_size("r", 64, {"m": [32, 192]})
    with pytest.raises(PipelineError, match=r"recipes\.r\.group_size is 128.*192 inputs of m"):
        quantize.check_group_size("r", 128, {"m": [32, 192]})


def test_relative_errors_are_frobenius_norms(rtn: Path, source: dict[str, torch.Tensor]) -> None:
    found = quantize.relative_errors(rtn, GOLDEN, 4)
    dense = load_model(rtn, torch.float32, CPU).state_dict()
    assert found.keys() == LINEARS.keys()
    for name, error in found.items():
        weight = source[f"{name}.weight"].double().numpy()
        difference = dense[f"{name}.weight"].double().numpy() - weight
        wanted = np.sqrt((difference**2).sum() / (weight**2).sum())
        assert error == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (8, 128)])
def test_other_formats_round_to_the_nearest_step(
    tmp_path: Path, source: dict[str, torch.Tensor], bits: Any, group_size: Any
) -> None:
    recipe = RtnRecipe(method="rtn", calibration="none", bits=bits, group_size=group_size, sym=True)
    folder = run_quantize(tmp_path, recipe, [])
    made = load_file(folder / "model.safetensors")
    dense = load_model(folder, torch.float32, CPU).state_dict()
    name = next(iter(LINEARS))
    weight = source[f"{name}.weight"].float()
    step = made[f"{name}.scales"].float().abs().repeat_interleave(group_size, dim=0).T
    inside = (weight.abs() < step * (2 ** (bits - 1) - 1)).numpy()
    error = (dense[f"{name}.weight"] - weight).abs()
    assert (error <= step / 2 * 1.001).numpy()[inside].all()
    total = sum(quantize.count_bytes(folder)["components"].values())
    assert total == METRICS["expected_bytes"][f"w{bits}g{group_size}"]
