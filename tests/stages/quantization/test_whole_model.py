"""End-to-end tuning within a checkpoint: its losses are those of the finished model, and it survives a crash."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from colqwen3.checkpoint.headers import SINGLE, Checkpoint
from colqwen3.checkpoint.packing import PACKED_TENSORS
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import DiskFullError, UserError
from colqwen3.system.files import read_json
from colqwen3.system.resume import Scratch
from stages.quantization import checkpoint, end_to_end, model_hessians, tuning, whole_model
from stages.quantization.activations import Sample
from stages.quantization.allocation import uniform
from stages.quantization.checkpoint import check_checkpoint, make_checkpoint
from stages.quantization.end_to_end import EndToEndOutcome
from stages.quantization.linears import Filled, Job
from stages.quantization.memory import memory_needed, sizes_of
from stages.quantization.recipes import EndToEnd, GptqRecipe, VisionBits
from tests.helpers.peak import Peak

GOLDEN, DEMO, CPU = Path("tests/golden/model"), Path("demo/model"), torch.device("cpu")
Made = Callable[[str], tuple[Path, Filled]]
KINDS = ["page", "query", "page", "query", "query"]
STEPS = EndToEnd(steps=60, codes_lr=0.002)
PLAIN = GptqRecipe(method="gptq", calibration="some", bits=3, group_size=128, sym=True)
RECIPES = {
    "plain": PLAIN,
    "model": PLAIN.model_copy(update={"hessian": "model"}),
    "model packed": PLAIN.model_copy(update={"hessian": "model", "batch_size": 3}),
    "tuned": PLAIN.model_copy(update={"end_to_end": STEPS}),
    "packed": PLAIN.model_copy(update={"end_to_end": STEPS, "batch_size": 3}),
    "scales": PLAIN.model_copy(update={"end_to_end": STEPS.model_copy(update={"codes_lr": 0.0})}),
    "front": PLAIN.model_copy(update={"end_to_end": STEPS, "token_embeddings": 4, "batch_size": 2}),
}


@cache
def samples(model: Path = GOLDEN) -> list[Sample]:
    processor = load_processor(model, 64)
    image = Image.linear_gradient("L")
    pages = [
        dict(processor.process_images([page]))
        for page in (image.resize((160, 128)), image.rotate(90).resize((96, 160)))
    ]
    queries = [
        dict(processor.process_texts([text]))
        # the first is held back: on a random model nothing is learned from other queries about it
        for text in ("total of the year", "costs", "total of the year")
    ]
    return [pages[0], queries[0], pages[1], queries[1], queries[2]]


def job(name: str, scratch: Scratch) -> Job:
    source, recipe = Checkpoint.read(GOLDEN), RECIPES[name]
    allocation = uniform("r", recipe, read_json(GOLDEN / "config.json", ""))
    return Job(source, allocation, recipe, samples(), CPU, scratch, KINDS)


def make(name: str, folder: Path) -> tuple[Path, Filled]:
    with Scratch(folder, "key") as scratch:
        work = job(name, scratch)
        made, filled = make_checkpoint(work)
        check_checkpoint(made, work)
    return made, filled


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return what makes a checkpoint by a recipe, once."""
    return cache(lambda name: make(name, tmp_path_factory.mktemp(name)))


@torch.inference_mode()
def losses_of(folder: Path, numbers: list[int], source: Path = GOLDEN) -> dict[str, float]:
    """Return 1 - mean cosine by kind, of a checkpoint run as a whole by transformers."""
    original, model = (load_model(path, torch.float32, CPU) for path in (source, folder))
    cosines: dict[str, list[torch.Tensor]] = {}
    for number in numbers:
        sample = samples(source)[number]
        pair = original(**sample).embeddings.double(), model(**sample).embeddings.double()
        cosines.setdefault(KINDS[number], []).append(torch.cosine_similarity(*pair, dim=-1)[0])
    return {kind: 1 - float(torch.cat(found).mean()) for kind, found in cosines.items()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / SINGLE)


@pytest.mark.parametrize("name", ["tuned", "packed", "scales", "front"])
def test_recorded_losses_are_those_of_the_finished_model(name: str, made: Made) -> None:
    folder, filled = made(name)
    outcome = filled.end_to_end
    assert outcome is not None
    assert outcome.won or name == "front", "the test needs a tuning that helps"
    held = outcome.held_after if outcome.won else outcome.held_before
    rest = outcome.after if outcome.won else outcome.before
    assert losses_of(folder, [0, 1]) == pytest.approx(held, rel=0.02)
    assert losses_of(folder, [2, 3, 4]) == pytest.approx(rest, rel=0.02)
    assert outcome.before != pytest.approx(outcome.after, rel=0.02)


def with_widths(
    source: Path, recipe: GptqRecipe, folder: Path
) -> tuple[Path, Filled, dict[str, int]]:
    """Make a checkpoint with 2, 3, 4 and 8 bits in turn in its language model."""
    plan = uniform("r", recipe, read_json(source / "config.json", ""))
    plan.linears.update(zip(plan.text, itertools.cycle((2, 3, 4, 8, 3)), strict=False))
    with Scratch(folder, "key") as scratch:
        work = Job(Checkpoint.read(source), plan, recipe, samples(source), CPU, scratch, KINDS)
        made, filled = make_checkpoint(work)
        check_checkpoint(made, work)
    return made, filled, plan.linears


@pytest.mark.parametrize(("source", "steps"), [(GOLDEN, 20), (DEMO, 1)])
def test_losses_hold_for_a_budget_and_whatever_else_is_quantized(
    source: Path, steps: int, tmp_path: Path
) -> None:
    """Only the demo model's vision tower can be: with it the deepstack features change."""
    front = {"vision": VisionBits(attention=4, mlp=4, mergers=4)} if source is DEMO else {}
    recipe = PLAIN.model_copy(
        update={
            "group_size": 32,
            "token_embeddings": 4,
            "end_to_end": EndToEnd(steps=steps),
            **front,
        }
    )
    folder, filled, widths = with_widths(source, recipe, tmp_path)
    assert set(widths.values()) == {2, 3, 4, 8}
    outcome = filled.end_to_end
    assert outcome is not None
    held = outcome.held_after if outcome.won else outcome.held_before
    rest = outcome.after if outcome.won else outcome.before
    assert losses_of(folder, [0, 1], source) == pytest.approx(held, rel=0.01)
    assert losses_of(folder, [2, 3, 4], source) == pytest.approx(rest, rel=0.01)


def test_one_sample_of_a_kind_is_an_error_before_the_first_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a layer was tuned")

    monkeypatch.setattr(tuning, "tune_layer", never)
    with Scratch(tmp_path, "key") as scratch:
        work = replace(job("tuned", scratch), kinds=["page", *["query"] * 4])
        with pytest.raises(UserError, match="the set has one page"):
            make_checkpoint(work)


def test_losses_before_are_those_of_the_layers_alone(made: Made) -> None:
    (folder, plain), (_, filled) = made("plain"), made("tuned")
    assert plain.end_to_end is None and filled.end_to_end is not None
    assert losses_of(folder, [0, 1]) == pytest.approx(filled.end_to_end.held_before, rel=0.02)


def test_only_codes_and_scales_differ_or_scales_alone(made: Made) -> None:
    plain, tuned, scales = (tensors(made(name)[0]) for name in ("plain", "tuned", "scales"))
    assert plain.keys() == tuned.keys() == scales.keys()

    def changed(other: dict[str, torch.Tensor]) -> set[str]:
        return {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], other[name])}  # fmt: skip

    assert changed(tuned) == {"qweight", "scales"}
    assert changed(scales) == {"scales"}


def test_weight_errors_are_of_the_tuned_weights(made: Made) -> None:
    (_, plain), (folder, tuned) = made("plain"), made("tuned")
    original = load_model(GOLDEN, torch.float32, CPU)
    finished = load_model(folder, torch.float32, CPU)
    for name, error in tuned.weight_errors.items():
        before, after = (m.get_submodule(name).weight.detach() for m in (original, finished))
        assert error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert tuned.weight_errors != plain.weight_errors


@pytest.mark.parametrize("place", ["before", "while"])
def test_a_run_killed_at_the_end_does_not_tune_a_layer_again(
    place: str, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tensors(made("tuned")[0])
    real = whole_model._write

    def killed(file: Any, result: dict[str, torch.Tensor]) -> None:
        real(file, dict(list(result.items())[: 0 if place == "before" else 5]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(whole_model, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            make("tuned", tmp_path / "killed")

    def never(*_: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(tuning, "tune_layer", never)
    monkeypatch.setattr(whole_model, "tune_end_to_end", never)
    again, filled = make("tuned", tmp_path / "killed")
    found = tensors(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert filled.end_to_end is not None and filled.end_to_end.won


def test_a_run_killed_during_the_steps_keeps_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(whole_model, "tune_end_to_end", killed)
        with pytest.raises(KeyboardInterrupt):
            make("tuned", tmp_path)
    assert len(json.loads((tmp_path / "state.json").read_text())["steps"]) > 1
    monkeypatch.setattr(tuning, "tune_layer", killed)
    _, filled = make("tuned", tmp_path)
    assert filled.end_to_end is not None


def test_what_did_not_help_is_not_kept(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tensors(made("plain")[0])
    real = end_to_end.tune_end_to_end

    def worse(*arguments: Any) -> EndToEndOutcome:
        outcome = real(*arguments)
        held = {kind: 2 * loss for kind, loss in outcome.held_before.items()}
        return EndToEndOutcome(outcome.before, outcome.after, outcome.held_before, held)

    monkeypatch.setattr(whole_model, "tune_end_to_end", worse)
    folder, filled = make("tuned", tmp_path)
    found = tensors(folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert filled.end_to_end is not None and not filled.end_to_end.won
    assert "end-to-end tuning made samples that it did not see worse" in caplog.text


@pytest.mark.parametrize("name", ["model", "model packed"])
def test_gptq_by_the_whole_model_loses_less_than_by_layers(name: str, made: Made) -> None:
    losses = [losses_of(made(way)[0], [0, 1, 2, 3, 4]) for way in ("plain", name)]
    # what is kept small is the sum over kinds: here the coarse queries gain and pages pay
    assert sum(losses[1].values()) < 0.95 * sum(losses[0].values())


def test_a_run_killed_between_layers_does_not_measure_effects_again(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, real, calls = tensors(made("model")[0]), tuning.tune_layer, 0

    def killed(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "tune_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            make("model", tmp_path)

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(whole_model, "measure_effects", never)
    found = tensors(make("model", tmp_path)[0])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_room_is_asked_for_what_gptq_by_the_whole_model_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(_: Path, needed: int, __: str) -> None:
        asked.append(needed)
        raise DiskFullError("full")

    def measured(*given: Any) -> Any:
        effects = real(*given)
        sizes.extend(
            tensor.nbytes
            for layer in effects
            for effect in layer.values()
            for tensor in (effect.outer, *effect.weights)
        )
        return effects

    real, sizes = model_hessians.measure_effects, list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_space", full)
        for name in ("plain", "model"):
            with Scratch(tmp_path / name, "key") as scratch, pytest.raises(DiskFullError):
                make_checkpoint(job(name, scratch))
    monkeypatch.setattr(whole_model, "measure_effects", measured)
    make("model", tmp_path)
    assert asked[1] - asked[0] == sum(sizes)


def test_room_is_asked_for_what_is_kept_of_the_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Made
) -> None:
    packed = tensors(made("plain")[0]).items()
    kept = sum(t.nbytes for name, t in packed if name.endswith(PACKED_TENSORS))
    asked = []

    def full(_: Path, needed: int, __: str) -> None:
        asked.append(needed)
        raise DiskFullError("full")

    monkeypatch.setattr(checkpoint, "check_space", full)
    for name in ("plain", "tuned"):
        with Scratch(tmp_path / name, "key") as scratch, pytest.raises(DiskFullError):
            make_checkpoint(job(name, scratch))
    assert asked[1] - asked[0] == kept


@pytest.mark.parametrize("name", ["model", "model packed", "tuned", "scales"])
def test_no_more_memory_is_asked_for_than_is_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES[name]
    if recipe.end_to_end:
        few = recipe.end_to_end.model_copy(update={"steps": 2})
        recipe = recipe.model_copy(update={"end_to_end": few})
    step = "tune_end_to_end" if recipe.end_to_end else "measure_effects"
    peak, work = Peak(), getattr(whole_model, step)

    def counted(*args: Any) -> Any:
        with peak:
            return work(*args)

    monkeypatch.setattr(whole_model, step, counted)
    with Scratch(tmp_path, "key") as scratch:
        current = replace(job(name, scratch), recipe=recipe)
        make_checkpoint(current)
        sizes = sizes_of(current, read_json(GOLDEN / "config.json", ""))
    (needed,) = memory_needed(recipe, sizes).values()
    assert needed <= peak.nbytes
