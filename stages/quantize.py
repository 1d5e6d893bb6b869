"""Stage `quantize@<recipe>`: AutoRound on the language model's linears, checked against the plan.

AutoRound: Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent", arXiv:2309.05516.
Rounding to nearest runs through the same library, without data and without tuning. Everything but
the planned linears must come out byte for byte as it went in.
"""

import argparse
import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stages.checkpoint import INDEX, SINGLE, read_headers, weight_files
from stages.colqwen3.deepstack import fold_deepstack
from stages.compute import choose_device, make_deterministic
from stages.errors import PipelineError, run
from stages.files import fresh_folder, publish_folder, read_json, write_json
from stages.layout import BLOCKS, component, is_unused, published_name
from stages.manifest import find_inspected_model, read_manifest
from stages.params import AutoRoundRecipe, RtnRecipe, load_params
from stages.paths import CALIBRATION, CHECKPOINTS, PLOTS, QUANTIZE_METRICS
from stages.samples import read_samples

logger = logging.getLogger(__name__)

Sample = dict[str, torch.Tensor]


class ForwardCounter:
    """Counts the calibration samples that really reached the first block.

    AutoRound drops a sample whose forward fails with no more than a warning, and its own count
    grows by the batch size. A forward that reaches the first block has been cached there.
    """

    def __init__(self, model: Any) -> None:
        self.started = self.reached = 0
        self._inside = False
        model.register_forward_pre_hook(self._start)
        model.get_submodule(BLOCKS)[0].register_forward_pre_hook(self._reach)

    def _start(self, *_: object) -> None:
        self.started += 1
        self._inside = True

    def _reach(self, *_: object) -> None:
        if self._inside:  # tuning calls the block too, but not through the model
            self.reached += 1
            self._inside = False


def check_group_size(name: str, group_size: int, linears: dict[str, list[int]]) -> None:
    """Refuse a group size that does not divide the inputs of every planned linear.

    Raises
    ------
    PipelineError
        Naming the recipe and the first linear that does not fit.
    """
    for linear, (_, in_features) in linears.items():
        if in_features % group_size:
            raise PipelineError(
                f"params.yaml: recipes.{name}.group_size is {group_size}, which does not divide the "
                f"{in_features} inputs of {linear}; choose a smaller one"
            )


def quantize(
    model: Any,
    processor: Any,
    recipe: AutoRoundRecipe | RtnRecipe,
    samples: Sequence[Sample],
    folder: Path,
    device: torch.device,
) -> int:
    """Quantize `model` with AutoRound into `folder` and return how many samples were used.

    The model is consumed: AutoRound leaves it without weights.

    Raises
    ------
    PipelineError
        If a calibration sample was lost on the way.
    """
    from auto_round import AutoRound

    options: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True}
    if isinstance(recipe, AutoRoundRecipe):  # otherwise there are no samples
        options = {
            "dataset": list(samples),
            "nsamples": len(samples),
            "batch_size": 1,  # a larger one would make AutoRound count a sample several times
            "gradient_accumulate_steps": recipe.gradient_accumulate_steps,
            "iters": recipe.iters,
            "lr": recipe.lr,
            "seed": recipe.seed,
        }
    if isinstance(recipe, AutoRoundRecipe) and recipe.deepstack:
        fold_deepstack(model)
    counter = ForwardCounter(model)
    rounder = AutoRound(
        model,
        tokenizer=processor.tokenizer,
        processor=processor,
        scheme="W4A16",
        bits=recipe.bits,
        group_size=recipe.group_size,
        sym=recipe.sym,
        to_quant_block_names=BLOCKS,
        device_map=str(device),
        enable_torch_compile=False,  # other bits, and minutes of compiling on a CPU
        enable_deterministic_algorithms=True,
        **options,
    )
    with contextlib.suppress(SystemExit):  # raised when no sample got through: reported below
        rounder.quantize_and_save(str(folder), format="auto_round")
    wanted = len(samples)
    if counter.reached != wanted or counter.started != wanted:
        raise PipelineError(
            f"calibration: {wanted} samples asked for, {counter.started} started, {counter.reached} "
            "reached the first block; AutoRound's warnings above say why the others were dropped"
        )
    return wanted


def collect(output: Path, source: Path, linears: dict[str, list[int]], target: Path) -> None:
    """Make the checkpoint in `target` from AutoRound's output and the source folder.

    The planned linears are AutoRound's; every other tensor is the source's own, because AutoRound
    turns them into float32 on a CPU that has no bfloat16 arithmetic. config.json is the source's own with AutoRound's
    ``quantization_config``, so that published field names stay; tokenizer and processor files are
    copied. Python files are not: nothing in the result runs code from the source.

    Raises
    ------
    PipelineError
        If another set of linears was quantized than planned, or another tensor changed.
    """
    made_tensors = dict(read_tensors(output))
    check_plan(made_tensors, linears)
    weights = {
        name: tensor for name, tensor in made_tensors.items() if name.rpartition(".")[0] in linears
    }
    for name, tensor in read_tensors(source):
        if name.removesuffix(".weight") in linears:
            continue
        check_untouched(name, tensor, made_tensors.get(name))
        weights[name] = tensor
    save_file(weights, target / SINGLE, metadata={"format": "pt"})
    mend = "run `dvc repro -f`"
    config = read_json(source / "config.json", mend)
    made = read_json(output / "config.json", mend)
    config["quantization_config"] = made["quantization_config"]
    config.pop("auto_map", None)
    write_json(target / "config.json", config)
    for path in sorted(source.iterdir()):
        if path.name in ("config.json", INDEX) or not path.is_file():
            continue
        if path.suffix == ".json" and "auto_map" in (read := read_json(path, mend)):
            # it names Python files, which stay behind
            write_json(target / path.name, {k: v for k, v in read.items() if k != "auto_map"})
        elif path.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(path, target / path.name)


def check_plan(names: Any, linears: dict[str, list[int]]) -> None:
    """Compare the packed linears among tensor `names` with the planned ones.

    Raises
    ------
    PipelineError
        Naming the first linear that was left out or quantized beyond the plan.
    """
    packed = {name.rpartition(".")[0] for name in names if name.endswith(".qweight")}
    for linear in sorted(packed ^ linears.keys()):
        problem = (
            "was quantized but not planned" if linear in packed else "was planned but not quantized"
        )
        raise PipelineError(f"quantize: {linear} {problem}; AutoRound's log above may say why")


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model folder by published name, unused ones left out."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - the file is no dictionary
                if not is_unused(stored):
                    yield published_name(stored), file.get_tensor(stored)


def check_untouched(name: str, before: torch.Tensor, after: torch.Tensor | None) -> None:
    """Check that AutoRound left the values of a tensor outside the plan alone.

    Raises
    ------
    PipelineError
        If it is gone or holds other values.
    """
    if after is None or not torch.equal(after.float(), before.float()):
        raise PipelineError(f"quantize: {name} is not planned for quantization, but it changed")


def relative_errors(folder: Path, source: Path, bits: int) -> dict[str, float]:
    """Return the relative error (Frobenius norm) of each quantized linear's weight, by name."""
    from stages.colqwen3.loading import dense_tensors

    packed = {
        name.removesuffix(".qweight") for name in read_headers(folder) if name.endswith(".qweight")
    }
    dense = {
        name: tensor
        for name, tensor in dense_tensors(folder, bits, torch.float32)
        if name.removesuffix(".weight") in packed
    }
    errors = {
        name.removesuffix(".weight"): float(
            (dense[name] - weight.float()).norm() / weight.float().norm().clamp(min=1e-12)
        )
        for name, weight in read_tensors(source)
        if name in dense
    }
    return {name: round(errors[name], 6) for name in sorted(errors, key=_layer_order)}


def _layer_order(name: str) -> tuple[int, str]:
    number, _, module = name.removeprefix(BLOCKS + ".").partition(".")
    return int(number), module


def count_bytes(folder: Path) -> dict[str, Any]:
    """Return the bytes of the tensors of each component and of the safetensors files."""
    parts: dict[str, int] = {}
    for name, tensor in read_headers(folder).items():
        part = component(published_name(name))
        parts[part] = parts.get(part, 0) + tensor.nbytes
    files = sum(path.stat().st_size for path in weight_files(folder))
    return {"components": parts, "files": files}


def main() -> None:
    """Make artifacts/checkpoints/<recipe> and its metrics."""
    parser = argparse.ArgumentParser(prog="python -m stages.quantize", description=__doc__)
    parser.add_argument("recipe", help="name of a recipe in params.yaml")
    name = parser.parse_args().recipe
    from stages.colqwen3.loading import load_model, load_processor, load_source_dtype

    params = load_params()
    recipe = params.recipe(name)
    manifest = read_manifest()
    source = find_inspected_model(params.model, manifest)
    linears = manifest["linears"]
    check_group_size(name, recipe.group_size, linears)
    device = choose_device(params.compute.device)
    make_deterministic()
    origins, samples = read_samples(CALIBRATION / recipe.calibration)
    trust = params.model.trust_remote_code
    # loaded on the CPU in the dtype it is stored in: AutoRound moves one block at a time
    model = load_model(source, load_source_dtype(source), torch.device("cpu"), trust)
    processor = load_processor(source, params.model.max_num_visual_tokens, trust)
    target = CHECKPOINTS / name
    scratch = fresh_folder(target.with_name(name + ".autoround"))
    used = quantize(model, processor, recipe, samples, scratch, device)
    partial = fresh_folder(target)
    collect(next(iter(sorted(scratch.rglob("config.json")))).parent, source, linears, partial)
    shutil.rmtree(scratch)
    errors = relative_errors(partial, source, recipe.bits)
    metrics = {
        "bytes": count_bytes(partial),
        "linears": {"planned": len(linears), "quantized": len(errors)},
        "calibration": {
            "samples": used,
            "queries": sum(origin.kind == "query" for origin in origins),
            "pages": sum(origin.kind == "page" for origin in origins),
            "passages": sum(origin.kind == "passage" for origin in origins),
            "tokens": sum(origin.tokens for origin in origins),
        },
        "relative_weight_error": {
            "mean": round(sum(errors.values()) / len(errors), 6),
            "max": max(errors.values()),
        },
    }
    write_json(QUANTIZE_METRICS / f"{name}.json", metrics)
    layers = [
        {"layer": layer.removeprefix(BLOCKS + "."), "error": error}
        for layer, error in errors.items()
    ]
    write_json(PLOTS / name / "layers.json", layers)
    publish_folder(partial, target)


if __name__ == "__main__":
    run(main)
