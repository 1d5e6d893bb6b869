"""The harness on a tiny model: what it records, what it does with failures and earlier results."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from colqwen3.checkpoint.headers import read_header
from colqwen3.model.loading import load_processor
from colqwen3.system.errors import UserError
from demo.benchmarks import size
from demo.benchmarks.measure import open_results
from demo.benchmarks.operations import page_operations
from demo.benchmarks.size import (
    STEPS,
    Bench,
    Result,
    StepError,
    draw_pages,
    prepare_run,
    ratios,
    run_steps,
)
from stages.checking.params import Params
from stages.pipeline.params import load_params

CONFIG = Path("demo/model/config.json")
MACHINE = {"cpu": "one"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(("--config", str(CONFIG.absolute())), tmp_path, "cpu", Path("demo/model"))


def made_of(machine: dict[str, Any] = MACHINE, size: str = "4b") -> Result:
    return {"machine": machine, "weights": "random, true shapes", "size": size}


def fresh() -> Result:
    return {**made_of(), "steps": {}}


def use(monkeypatch: pytest.MonkeyPatch, **steps: Callable[[Bench], Result]) -> None:
    monkeypatch.setitem(STEPS, "cpu", steps)


def test_real_steps_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "cpu.json"
    words = ["--config", str(CONFIG), "--work", str(tmp_path / "work"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["size", *words, "--only", "inspect,floor,rtn"])
    size.main()
    results = json.loads(out.read_text())
    steps = results["steps"]
    assert list(steps) == sorted(["make", "inspect", "floor", "rtn"])  # make, since there was none
    assert all(step["status"] == "ok" for step in steps.values()), steps
    assert results["weights"] == "random, true shapes"
    assert results["machine"]["cores"] > 0
    headers = [read_header(path) for path in Path("demo/model").glob("*.safetensors")]
    stored = [tensor for header in headers for tensor in header.values()]
    parameters = sum(math.prod(tensor.shape) for tensor in stored)
    assert steps["inspect"]["parameters"] == parameters
    result = tmp_path / "work/run-rtn-w4g128/artifacts/checkpoints/rtn-w4g128/model.safetensors"
    packed = read_header(result)
    assert steps["inspect"]["linears"] == sum(name.endswith(".qweight") for name in packed)
    written = sum(tensor.nbytes for tensor in packed.values())
    assert steps["floor"]["written_bytes"] == steps["rtn"]["expected_bytes"] == written
    assert steps["floor"]["read_bytes"] > 2 * parameters
    assert steps["rtn"]["files_bytes"] == result.stat().st_size > written
    assert all(step["peak_own_bytes"] > 1_000_000 for step in steps.values())
    assert results["ratios"]["rtn / reading and writing its bytes"] > 0
    printed = capsys.readouterr().out
    assert "rtn: " in printed and "rtn / reading and writing its bytes: " in printed


def test_gptq_is_measured_on_the_samples_of_autoround(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size, "MIXED", {"queries": 2, "pages": 1})
    bench = Bench(("--config", str(CONFIG.absolute())), tmp_path, "cpu", Path("demo/model"))
    step = STEPS["cuda"]["gptq"](bench)
    assert step["calibration"]["samples"] == 3
    assert step["files_bytes"] > step["expected_bytes"] > 0
    assert step["seconds"] > 0 and step["peak_own_bytes"] > 1_000_000
    assert not bench.checkpoint("gptq").exists()


def test_end_to_end_tuning_is_measured_on_the_samples_of_gptq(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size, "MIXED", {"queries": 2, "pages": 2})
    monkeypatch.setattr(size, "END_TO_END_STEPS", 2)
    bench = Bench(("--config", str(CONFIG.absolute())), tmp_path, "cpu", Path("demo/model"))
    step = STEPS["cuda"]["end-to-end"](bench)
    assert (step["calibration"]["samples"], step["steps"]) == (4, 2)
    assert step["seconds"] > 0 and step["peak_own_bytes"] > 1_000_000
    assert not bench.checkpoint("end-to-end").exists()


def test_a_failing_step_is_recorded_and_the_others_go_on(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: Bench) -> Result:
        return bench.call("fail", "-c", "print('first'); raise ValueError('the last line')")

    done = {"seconds": 1.0, "peak_own_bytes": 2}
    use(monkeypatch, bad=fail, good=lambda _: done)
    results, out = fresh(), tmp_path / "out.json"
    run_steps(bench, ["bad", "good"], results, out)
    steps = json.loads(out.read_text())["steps"]
    assert steps["bad"]["status"] == "failed"
    assert steps["bad"]["error"] == "ValueError: the last line"
    assert steps["good"] == {"status": "ok", **done, "load_before": steps["good"]["load_before"]}
    assert "bad: failed: ValueError: the last line" in capsys.readouterr().out


def test_results_are_written_after_every_step(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"

    def killed(_: Bench) -> Result:
        assert json.loads(out.read_text())["steps"].keys() == {"first"}
        raise KeyboardInterrupt

    use(monkeypatch, first=lambda _: {"seconds": 1, "peak_own_bytes": 2}, second=killed)
    with pytest.raises(KeyboardInterrupt):
        run_steps(bench, ["first", "second"], fresh(), out)


def test_a_step_adds_to_earlier_results_of_the_same_machine(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    done = {"seconds": 1, "peak_own_bytes": 2}
    use(monkeypatch, a=lambda _: done, b=lambda _: done)
    for name in ("a", "b"):
        run_steps(bench, [name], open_results(out, made_of(), "steps"), out)
    assert json.loads(out.read_text())["steps"].keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("machine", "size", "key"), [({"cpu": "two"}, "4b", "machine"), (MACHINE, "8b", "size")]
)
def test_results_of_another_kind_are_not_mixed(
    machine: dict[str, Any], size: str, key: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    out.write_text(json.dumps(fresh()))
    with pytest.raises(UserError, match=rf"out\.json: was measured with another {key}"):
        open_results(out, made_of(machine, size), "steps")
    assert open_results(out, made_of(machine, size), "steps", anew=True)["steps"] == {}


def test_unknown_steps_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["size", "--work", str(tmp_path / "work"), "--only", "make,makee"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match="'makee' is no step; there are make, inspect, "):
        size.main()
    assert not list(tmp_path.iterdir())


def test_pages_have_the_visual_tokens_of_a4(tmp_path: Path) -> None:
    draw_pages(Path("demo/pages/evaluation/corpus"), 2, tmp_path / "pages")
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == [
        "page-000.png",
        "page-001.png",
    ]
    processor = load_processor(Path("demo/model"), 1280)
    with Image.open(tmp_path / "pages" / "page-001.png") as image:
        assert processor.process_images([image])["input_ids"].shape == (1, 1271)


def test_a_working_folder_is_what_the_stages_take(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str | Path] = []

    def call(_: Bench, name: str, *command: str | Path, folder: Path) -> Result:
        calls.append(command[1])
        if command[1] == "stages.calibrate":
            (folder / "artifacts/calibration").mkdir(parents=True)
        return {}

    monkeypatch.setattr(Bench, "call", call)
    recipe = {"method": "autoround", "calibration": "measured", "iters": 20, "seed": 1}
    samples = {"queries": 2, "pages": 3}
    folder = prepare_run(bench, "tuned", recipe, samples)
    monkeypatch.chdir(folder)
    params = load_params(Params)
    result = params.recipes["tuned"]
    assert (result.bits, result.group_size, result.method) == (4, 128, "autoround")
    drawn = params.calibration.sets["measured"]
    assert (drawn.queries, drawn.pages, drawn.passages) == (2, 3, 0)
    assert len(list(Path(params.calibration.dataset, "corpus").iterdir())) == 16
    assert Path(params.model.source).is_absolute()
    assert params.compute.device == "cpu"
    assert calls == ["stages.inspect_model", "stages.allocate", "stages.calibrate"]
    again = prepare_run(bench, "again", recipe, samples)
    assert (again / "artifacts/calibration").is_dir()  # the same samples are made once
    assert calls.count("stages.calibrate") == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_stage_that_fails_names_its_last_words(device: str, bench: Bench) -> None:
    bench = replace(bench, device=device)
    with pytest.raises(StepError, match=r"exit status 1: error: params\.yaml[^\n]*$"):
        bench.stage("x", bench.work, "stages.inspect_model")


def test_ratios_by_hand(published_4b: dict[str, Any]) -> None:
    steps: dict[str, Result] = {
        "floor": {"status": "ok", "read_seconds": 2.0, "write_seconds": 3.0},
        "rtn": {"status": "ok", "seconds": 20.0},
        "rtn-library": {"status": "ok", "seconds": 40.0},
        "rates": {"status": "ok", "bf16_flops": 1e14},
        "tune-50": {"status": "ok", "seconds": 30.0, "operations": 10**15},
        "tune-200": {"status": "failed", "error": "x", "operations": 1},
        "embed": {"status": "ok", "budgets": [
            {"visual_tokens_per_batch": 5120, "pages_per_second": 0.5, "tokens_per_page": 111.0},
            {"visual_tokens_per_batch": 10240, "out_of_memory": True},
        ]},
    }  # fmt: skip
    actual = ratios(steps, published_4b)
    page = actual.pop("embed (5120 visual tokens a batch) / its operations at peak")
    assert page == pytest.approx(2 / (page_operations(published_4b, 111, 100) / 1e14), rel=1e-3)
    assert actual == {
        "rtn / reading and writing its bytes": 4.0,
        "rtn / AutoRound's model-free path": 0.5,
        "tune-50 / its operations at peak": 3.0,
    }
