"""Quantization against rounding recomputed by hand from the source weights."""

import errno
import hashlib
import json
import math
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.headers import SINGLE, Checkpoint, read_headers
from colqwen3.checkpoint.layout import BLOCKS
from colqwen3.inspection import inspect_folder
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import DiskFullError, NonFiniteWeightsError, UserError, run
from colqwen3.system.files import write_json
from colqwen3.system.resume import Scratch
from stages import quantize
from stages.pipeline.paths import MANIFEST as MANIFEST_FILE
from stages.pipeline.paths import QUANTIZED
from stages.quantization import gptq, linears, memory
from stages.quantization.activations import Sample, SamplesLostError
from stages.quantization.allocation import uniform
from stages.quantization.checkpoint import check_checkpoint, count_bytes, make_checkpoint
from stages.quantization.linears import Filled, Job, round_linears
from stages.quantization.recipes import AnyRecipe, AutoRoundRecipe, GptqRecipe, RtnRecipe
from stages.quantization.tuning import check_quantized
from tests.golden.variants import Variant, write_variant
from tests.helpers.allocation import write_allocations
from tests.helpers.packed import load_packed

GOLDEN = Path("tests/golden/model")
MANIFEST, METRICS = inspect_folder(GOLDEN)
LINEARS: dict[str, list[int]] = MANIFEST["linears"]
CPU = torch.device("cpu")
DEMO_SHARD = Path("demo/model/model-00001-of-00002.safetensors")
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

GPTQ = GptqRecipe(method="gptq", calibration="some", bits=4, group_size=128, sym=True)


def samples() -> list[Sample]:
    processor = load_processor(GOLDEN, 64)
    texts = [dict(processor.process_texts([text])) for text in ("net value", "index share")]
    image = Image.linear_gradient("L").resize((128, 192))
    return [*texts, dict(processor.process_images([image]))]


def samples_of(folder: Path) -> Sample:
    image = Image.linear_gradient("L").resize((128, 192))
    return dict(load_processor(folder, 64).process_images([image]))


def job(
    recipe: AnyRecipe,
    used: list[Sample],
    scratch: Scratch,
    source: Path = GOLDEN,
) -> Job:
    config = json.loads((source / "config.json").read_text())
    allocation = uniform("r", recipe, config)
    return Job(Checkpoint.read(source), allocation, recipe, used, CPU, scratch)


def run_quantize(
    folder: Path, recipe: AnyRecipe, used: list[Sample], source: Path = GOLDEN
) -> Path:
    with Scratch(folder / "scratch", "key") as scratch:
        work = job(recipe, used, scratch, source)
        result, filled = make_checkpoint(work)
        check_checkpoint(result, work)
    assert filled.weight_errors.keys() == LINEARS.keys()
    return result


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
    counted = count_bytes(rtn)
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


def test_packs_tune_as_well(tuned: Path, tmp_path: Path) -> None:
    recipe = TUNED.model_copy(update={"batch_size": 3, "gradient_accumulate_steps": 1})
    packed = run_quantize(tmp_path, recipe, samples())
    one, other = (load_model(path, torch.float32, CPU).state_dict() for path in (tuned, packed))
    name = f"{next(iter(LINEARS))}.weight"
    difference = float((one[name] - other[name]).norm() / one[name].norm())
    assert 0 < difference < 0.1  # other sums, so other bits, but alike


def test_two_runs_give_equal_bytes(tuned: Path, tmp_path: Path) -> None:
    again = run_quantize(tmp_path, TUNED, samples())
    digests = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (tuned, again)
    ]
    assert digests[0] == digests[1]


def test_rtn_equals_the_library_on_the_whole_model(rtn: Path, tmp_path: Path) -> None:
    from auto_round import AutoRound

    rounder = AutoRound(
        load_model(GOLDEN, torch.bfloat16, CPU),
        tokenizer=(processor := load_processor(GOLDEN, 64)).tokenizer,
        processor=processor,
        scheme="W4A16",
        iters=0,
        disable_opt_rtn=True,
        to_quant_block_names=BLOCKS,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounder.quantize_and_save(str(tmp_path), format="auto_round")
    (path,) = tmp_path.rglob("*.safetensors")
    wanted, found = load_file(path), load_file(rtn / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name in found:
        if name.rpartition(".")[0] in LINEARS:
            assert torch.equal(found[name], wanted[name]), name


def test_lost_calibration_sample_fails(tmp_path: Path) -> None:
    good = samples()
    broken = {**good[2], "pixel_values": good[2]["pixel_values"][:-4]}
    with pytest.raises(SamplesLostError, match="calibration sample 1 fails in the model"):
        run_quantize(tmp_path, TUNED, [good[0], broken, good[1]])


def test_huge_and_nan_weights_are_refused(tmp_path: Path) -> None:
    tensors = load_file(DEMO_SHARD)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    for value in (float("nan"), float("inf"), 1e10):
        source = tmp_path / str(value)
        shutil.copytree("demo/model", source)
        changed = {**tensors, name: tensors[name].clone()}
        changed[name][3, 5] = value
        save_file(changed, source / DEMO_SHARD.name, metadata={"format": "pt"})
        for recipe, used in ((RTN, []), (TUNED, samples()[:1])):
            if value == 1e10 and recipe is TUNED:
                continue  # finite: AutoRound tunes what it is given
            with (
                Scratch(tmp_path / "scratch", "key") as scratch,
                pytest.raises(NonFiniteWeightsError, match="holds NaN"),
            ):
                make_checkpoint(job(recipe, used, scratch, source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("embedding_proj_layer.bias"), "embedding_proj_layer.bias is missing"),
        (lambda t: t.update(more=torch.zeros(2)), "more was not planned"),
        (lambda t: t["embedding_proj_layer.bias"].add_(1), "bias is not planned .* changed"),
        (
            lambda t: t.update(
                {"embedding_proj_layer.bias": t["embedding_proj_layer.bias"].half()}
            ),
            "bias has another dtype",
        ),
    ],
)
def test_another_checkpoint_than_planned_fails(
    rtn: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    tensors = load_file(rtn / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with Scratch(tmp_path / "scratch", "key") as scratch:
        work = job(RTN, [], scratch)
        with pytest.raises(UserError, match=message):
            check_checkpoint(tmp_path, work)


def test_quantized_linears_must_be_the_planned_ones() -> None:
    block = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    block["a"].scale = block["b"].scale = torch.ones(1)
    check_quantized(block, "layer 0", {"a", "b"})
    with pytest.raises(UserError, match="c of layer 4 was planned but not quantized"):
        check_quantized(block, "layer 4", {"a", "b", "c"})
    with pytest.raises(UserError, match="b of layer 0 was quantized but not planned"):
        check_quantized(block, "layer 0", {"a"})


def test_relative_errors_are_frobenius_norms(
    tmp_path: Path, source: dict[str, torch.Tensor]
) -> None:
    for recipe, used in ((RTN, []), (TUNED, samples())):
        with Scratch(tmp_path / "scratch", recipe.method) as scratch:
            made, filled = make_checkpoint(job(recipe, used, scratch))
        found = filled.weight_errors
        dense = load_model(made, torch.float32, CPU).state_dict()
        assert found.keys() == LINEARS.keys()
        for name, error in found.items():
            weight = source[f"{name}.weight"].double().numpy()
            difference = dense[f"{name}.weight"].double().numpy() - weight
            wanted = np.sqrt((difference**2).sum() / (weight**2).sum())
            assert error == pytest.approx(wanted, abs=1e-6)


def test_damaged_work_is_begun_again(
    tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stopped(Exception):
        pass

    class StopAfterTwo(Scratch):
        def record(self, files: dict[str, str], step: Any = None) -> None:
            super().record(files, step)
            if len(self.steps) == 2:
                raise Stopped

    def start() -> None:
        with pytest.raises(Stopped), StopAfterTwo(tmp_path / "scratch", "key") as scratch:
            make_checkpoint(job(TUNED, samples(), scratch))

    def finish() -> bool:
        caplog.clear()
        with caplog.at_level("INFO"), Scratch(tmp_path / "scratch", "key") as scratch:
            made, _ = make_checkpoint(job(TUNED, samples(), scratch))
        assert (made / SINGLE).read_bytes() == (tuned / SINGLE).read_bytes()
        shutil.rmtree(tmp_path / "scratch")
        return "continuing after layer 2 of" in caplog.text

    start()
    assert finish()
    start()
    weights = tmp_path / "scratch" / "checkpoint" / SINGLE
    place = read_headers(weights.parent)[f"{BLOCKS}.1.self_attn.q_proj.qweight"].start
    data = bytearray(weights.read_bytes())
    data[place] ^= 1  # one bit of the second layer's weights
    weights.write_bytes(data)
    assert not finish()
    assert "layer 1 in it is damaged" in caplog.text
    start()
    weights.unlink()
    assert not finish()


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
    total = sum(count_bytes(folder)["components"].values())
    assert total == METRICS["expected_bytes"][f"w{bits}g{group_size}"]


FALLBACK = {"method": "rtn", "calibration": "none", "bits": 4, "group_size": 32, "sym": True}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """The stage of a recipe called ``primary``, on the golden model or, with its vision tower too, the demo's."""
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(Path("params.yaml").read_text())
    golden, demo = str(GOLDEN.resolve()), str(Path("demo/model").resolve())
    params["calibration"]["sets"] = {"mine": {"queries": 2, "pages": 0, "passages": 0}}
    write_json(tmp_path / "artifacts/calibration/none/index.json", {"samples": []})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quantize", "primary"])

    def run_stage(recipe: dict[str, Any]) -> None:
        params["model"]["source"] = demo if recipe.get("vision") else golden
        write_json(MANIFEST_FILE, inspect_folder(Path(params["model"]["source"]))[0])
        recipe = dict(recipe)
        params["fallbacks"] = {"primary": recipe.pop("fallback")} if "fallback" in recipe else {}
        params["recipes"] = {"primary": recipe, "plain": FALLBACK}
        with Path("params.yaml").open("w") as file:
            yaml.dump(params, file)
        write_allocations(tmp_path, Path(params["model"]["source"]), "primary")
        run(quantize.main)

    return run_stage


def fail(reason: Exception) -> Callable[..., None]:
    def round_linears(*_: object, **__: object) -> None:
        raise reason

    return round_linears


def test_a_fallback_runs_only_after_a_failure_and_is_told_of(
    stage: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = {**FALLBACK, "group_size": 64, "fallback": "plain"}
    stage(primary)
    made = json.loads((QUANTIZED / "primary.json").read_text())["recipe"]
    assert (made["ran"], made["values"]["group_size"]) == ("primary", 64)
    assert made.keys() == {"ran", "values"}

    work = round_linears

    def once(*args: Any) -> Filled:
        monkeypatch.setattr(linears, "round_linears", work)
        raise torch.OutOfMemoryError("no memory on /home/someone/models/it: 3 GB wanted\nmore")

    monkeypatch.setattr(linears, "round_linears", once)
    stage(primary)
    made = json.loads((QUANTIZED / "primary.json").read_text())["recipe"]
    assert (made["ran"], made["instead_of"]) == ("plain", "primary")
    assert made["values"]["group_size"] == 32
    assert made["because"] == "no memory on it: 3 GB wanted"
    scales = load_file("artifacts/checkpoints/primary/model.safetensors")[
        f"{next(iter(LINEARS))}.scales"
    ]
    assert scales.shape[0] == LINEARS[next(iter(LINEARS))][1] // 32


@pytest.mark.parametrize(
    ("fallback", "reason"),
    [
        ({}, SamplesLostError("lost a sample")),
        ({"fallback": "plain"}, OSError(errno.ENOSPC, "No space left on device")),
        ({"fallback": "plain"}, DiskFullError("artifacts: needs 9 bytes, 1 byte is free")),
        ({"fallback": "plain"}, UserError("the result is not as planned")),
    ],
)
def test_nothing_falls_back_unasked_or_for_another_reason(
    stage: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    fallback: dict[str, str],
    reason: Exception,
) -> None:
    monkeypatch.setattr(linears, "round_linears", fail(reason))
    with pytest.raises(SystemExit):
        stage({**FALLBACK, **fallback})
    assert not (QUANTIZED / "primary.json").exists()
    assert not Path("artifacts/checkpoints/primary").exists()


def test_all_linears_are_those_of_the_model_but_the_projection(
    stage: Callable[[dict[str, Any]], None],
) -> None:
    stage({**FALLBACK, "vision": 4})
    made = load_file("artifacts/checkpoints/primary/model.safetensors")
    quantized = {name[: -len(".qweight")] for name in made if name.endswith(".qweight")}
    # both loaders read it: auto-round's kernels, and dense weights
    folder = Path("artifacts/checkpoints/primary")
    inputs = samples_of(folder)
    packed, dense = (load(folder, torch.float32, CPU) for load in (load_packed, load_model))
    linear = {name for name, module in dense.named_modules() if type(module) is torch.nn.Linear}
    assert quantized == linear - {"embedding_proj_layer"}
    with torch.inference_mode():
        one, other = (model(**inputs).embeddings for model in (packed, dense))
    assert torch.nn.functional.cosine_similarity(one, other, dim=-1).min() > 0.99999


@pytest.mark.parametrize(
    "reason",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        SamplesLostError("lost a sample"),
        NonFiniteWeightsError("q_proj came back with NaN"),
    ],
)
def test_named_causes_start_the_fallback(
    stage: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch, reason: Exception
) -> None:
    work = round_linears

    def once(*args: Any) -> Filled:
        monkeypatch.setattr(linears, "round_linears", work)
        raise reason

    monkeypatch.setattr(linears, "round_linears", once)
    stage({**FALLBACK, "group_size": 64, "fallback": "plain"})
    assert json.loads((QUANTIZED / "primary.json").read_text())["recipe"]["ran"] == "plain"


def test_too_little_memory_for_end_to_end_tuning_is_told_before_any_layer(
    stage: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = {**FALLBACK, "method": "gptq", "calibration": "mine", "end_to_end": {"steps": 2}}
    write_json(Path("artifacts/calibration/mine/index.json"), {"samples": []})
    monkeypatch.setattr(linears, "tune_linears", fail(AssertionError("began")))
    needed = 13 * sum(math.prod(shape) for shape in LINEARS.values())
    monkeypatch.setattr(memory, "memory_of", lambda device: needed - 1)
    with pytest.raises(SystemExit):
        stage(recipe)
    said = capsys.readouterr().err
    assert "error: params.yaml: recipes.primary.end_to_end needs more than 0.0 GB" in said
    assert "Traceback" not in said
    stage({**recipe, "fallback": "plain"})
    assert json.loads((QUANTIZED / "primary.json").read_text())["recipe"]["ran"] == "plain"
    monkeypatch.setattr(memory, "memory_of", lambda device: needed)
    with pytest.raises(AssertionError, match="began"):
        stage(recipe)


def test_a_fallback_has_the_memory_of_what_failed(
    stage: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, alive = round_linears, []

    def again(*args: Any) -> dict[str, float]:
        alive.append(held[0]() is not None)
        return work(*args)

    def once(*_: Any) -> Filled:
        model = torch.nn.Linear(2, 2)
        held.append(weakref.ref(model))
        monkeypatch.setattr(linears, "round_linears", again)
        raise torch.OutOfMemoryError("no memory")

    held: list[weakref.ref[torch.nn.Module]] = []
    monkeypatch.setattr(linears, "round_linears", once)
    stage({**FALLBACK, "group_size": 64, "fallback": "plain"})
    assert alive == [False]


def test_a_defect_of_our_own_is_shown_and_not_hidden_by_a_fallback(
    stage: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, "round_linears", fail(TypeError("a defect")))
    with pytest.raises(TypeError, match="a defect"):
        stage({**FALLBACK, "fallback": "plain"})
    assert not Path("artifacts/checkpoints/primary").exists()


def test_one_step_is_one_step(rtn: Path, tmp_path: Path) -> None:
    one = run_quantize(tmp_path, TUNED.model_copy(update={"iters": 1, "lr": 0.05}), samples())
    plain, tuned = (load_file(folder / SINGLE) for folder in (rtn, one))
    names = [f"{name}.qweight" for name in LINEARS]
    assert not all(torch.equal(plain[name], tuned[name]) for name in names)


COMBINATIONS = [
    (bits, group_size, iters)
    for bits in (2, 3, 4, 8)
    for group_size in (32, 64, 128)
    for iters in (None, 0, 1, 3, "gptq")
]


@pytest.mark.parametrize(("bits", "group_size", "iters"), COMBINATIONS)
def test_every_allowed_combination_runs(
    tmp_path: Path, bits: Any, group_size: Any, iters: int | str | None
) -> None:
    recipe: AnyRecipe = RTN.model_copy(update={"bits": bits, "group_size": group_size})
    if iters == "gptq":
        recipe = GPTQ.model_copy(update={"bits": bits, "group_size": group_size})
    elif iters is not None:
        fields = {"bits": bits, "group_size": group_size, "iters": iters, "lr": 0.01}
        recipe = TUNED.model_copy(update=fields)
    folder = run_quantize(tmp_path, recipe, samples() if iters is not None else [])
    total = sum(count_bytes(folder)["components"].values())
    assert total == METRICS["expected_bytes"][f"w{bits}g{group_size}"]
    assert all(p.isfinite().all() for p in load_model(folder, torch.float32, CPU).parameters())


def test_tuning_beats_rounding_and_a_layer_that_loses_is_rounded(
    rtn: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Scratch(tmp_path / "good", "key") as scratch:
        recipe = TUNED.model_copy(update={"iters": 20, "lr": 0.01})
        _, filled = make_checkpoint(job(recipe, samples(), scratch))
    assert all(outcome.tuned < 0.9 * outcome.rounded for outcome in filled.outcomes)
    with Scratch(tmp_path / "bad", "key") as scratch:
        wild = TUNED.model_copy(update={"iters": 5, "lr": 0.9})  # not allowed in params.yaml
        work = job(wild, samples(), scratch)
        folder, filled = make_checkpoint(work)
        check_checkpoint(folder, work)
    assert not any(outcome.tuning_won for outcome in filled.outcomes)
    assert "tuning made the output worse than rounding" in caplog.text
    assert (folder / SINGLE).read_bytes() == (rtn / SINGLE).read_bytes()


@pytest.mark.parametrize("size", [1, 2])
def test_gptq_sees_the_inputs_of_the_quantized_model(
    source: dict[str, torch.Tensor], tmp_path: Path, size: int
) -> None:
    """Each layer's Hessian is of the whole model with its earlier layers quantized, deepstack too."""
    recipe, used = GPTQ.model_copy(update={"batch_size": size}), samples()
    with Scratch(tmp_path / "scratch", "key") as scratch:
        folder, filled = make_checkpoint(job(recipe, used, scratch))
    assert all(outcome.tuned < outcome.rounded for outcome in filled.outcomes)
    model = load_model(folder, torch.float32, CPU)
    names = [name for name in LINEARS if name.endswith(("q_proj", "gate_proj"))]
    original = load_model(GOLDEN, torch.float32, CPU).state_dict()
    for name in names:
        linear: Any = model.get_submodule(name)
        seen: list[torch.Tensor] = []
        if name.endswith("gate_proj"):  # of the layer itself, its attention is the original's
            layer: Any = model.get_submodule(name.removesuffix(".mlp.gate_proj"))
            kept = {key: value.clone() for key, value in layer.state_dict().items()}
            prefix = name.removesuffix("mlp.gate_proj")
            layer.load_state_dict({key: original[prefix + key] for key in kept})
        handle = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.inference_mode():
            for sample in used:
                model(**sample)
        handle.remove()
        if name.endswith("gate_proj"):
            layer.load_state_dict(kept)
        tokens = torch.cat([item[0] for item in seen]).double()
        codes, scales = gptq.quantize_weight(original[f"{name}.weight"], tokens.T @ tokens, 4, 128)
        expected = codes.double() * scales.double().repeat_interleave(128, dim=1)
        equal = (linear.weight.double() - expected).abs() < 1e-6
        assert float(equal.double().mean()) > 0.999, name


def test_gptq_goes_on_after_a_layer_and_gives_equal_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = run_quantize(tmp_path / "calm", GPTQ, samples())
    real, calls = gptq.quantize_weight, 0

    def fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 17:  # in the third layer
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(gptq, "quantize_weight", fails)
    with Scratch(tmp_path / "scratch", "key") as scratch, pytest.raises(KeyboardInterrupt):
        make_checkpoint(job(GPTQ, samples(), scratch))
    with Scratch(tmp_path / "scratch", "key") as scratch:
        assert len(scratch.steps) == 2
        resumed, filled = make_checkpoint(job(GPTQ, samples(), scratch))
    assert calls == 17 + 7 * 2  # the layers before are not quantized again
    assert (resumed / SINGLE).read_bytes() == (calm / SINGLE).read_bytes()
    assert filled.weight_errors.keys() == LINEARS.keys()


def test_gptq_without_deepstack_is_another_checkpoint(tmp_path: Path) -> None:
    naive = GPTQ.model_copy(update={"deepstack": False})
    one, other = (
        load_file(run_quantize(tmp_path / name, recipe, samples()) / SINGLE)
        for name, recipe in (("true", GPTQ), ("naive", naive))
    )
    layers = {
        name.split(".")[4] for name in one if not torch.equal(one[name], other[name])
    }  # the first is given the same
    assert layers and "0" not in layers
