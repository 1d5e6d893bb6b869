"""params.yaml as shipped, and every way of getting it wrong that we could think of."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from dvc.utils.serialize import parse_yaml

from colqwen3.system.device import ActivationsKind
from colqwen3.system.errors import UserError
from stages.calibration.sets import CalibrationParams
from stages.checking.params import RESERVED_NAMES, Params
from stages.evaluation.limits import GateParams
from stages.pipeline.params import (
    BenchmarkParams,
    ComputeParams,
    EmbedParams,
    EvaluateParams,
    ModelParams,
    Section,
    ServingOptions,
    choose_recipe,
    load_params,
)
from stages.quantization.recipes import AutoRoundRecipe, GptqRecipe, RtnRecipe

SHIPPED = Path("params.yaml")
SECTIONS: dict[str, type[Section]] = {
    "model": ModelParams,
    "calibration": CalibrationParams,
    "embed": EmbedParams,
    "evaluate": EvaluateParams,
    "benchmark": BenchmarkParams,
    "gate": GateParams,
    "compute": ComputeParams,
}
# every line differs from every other, so that an edit names the one it means
GOOD = """\
model:
  source: some/model
  revision: null
  trust_remote_code: false
  max_num_visual_tokens: 1280
calibration:
  dataset: some/calibration
  seed: 42
  sets:
    some:
      queries: 3
      pages: 2
      passages: 0
    other: {queries: 0, pages: 0, passages: 4, seed: 43}
recipes:
  tuned:
    method: autoround
    calibration: some
    bits: 4
    group_size: 128
    sym: true
    iters: 50
    lr: 0.005
    seed: 7
  plain:
    method: rtn
    calibration: none
    bits: 3
    group_size: 32
    sym: True
sensitivity:
  calibration: other
  pages: 7
  queries: 9
  group_size: 64
embed:
  dtype: float32
  queries_per_batch: 16
  visual_tokens_per_batch: 1281
evaluate:
  dataset: some/evaluation
benchmark:
  dtype: bfloat16
  query_tokens: 26
  query_batches: [1, 8]
  int8_activations: false
  page_batches: [1]
  warmup: 0
  repeats: 10
gate:
  min_query_cosine: 0.95
  min_page_cosine: null
  max_ndcg_at_5_drop: 0.05
  max_bytes: null
compute:
  device: auto
"""
RECIPES = GOOD[GOOD.index("recipes:") : GOOD.index("sensitivity:")]
TAKEN = ("original",)
PLAIN = RECIPES[RECIPES.index("  plain:") :]


def edit(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, f"{old!r} occurs {GOOD.count(old)} times"
    return GOOD.replace(old, new)


def load(folder: Path, text: str | bytes) -> Params:
    path = folder / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_params(Params, path)


def refusal(folder: Path, text: str | bytes) -> str:
    """Return what is said about the file, after checking that it is one short line naming it."""
    with pytest.raises(UserError) as caught:
        load(folder, text)
    message = str(caught.value)
    start = f"{folder / 'params.yaml'}: "
    assert message.startswith(start)
    said = message.removeprefix(start)
    assert len(said.splitlines()) == 1
    assert len(said) < 500
    return said


# ---- What is shipped ----------------------------------------------------------------------------


def test_activations_are_those_of_the_runtime() -> None:
    named = get_args(ServingOptions.model_fields["activations"].annotation)
    assert named == get_args(ActivationsKind)


def test_shipped_file_loads_with_the_recipes_that_the_readme_names() -> None:
    params = load_params(Params, SHIPPED)
    assert isinstance(params.recipes["w4g128"], AutoRoundRecipe)
    assert isinstance(params.recipes["rtn-w4g128"], RtnRecipe)
    assert isinstance(params.recipes["small"], GptqRecipe)
    assert params.recipes["small"].end_to_end and params.recipes["small"].hessian == "model"
    assert not params.model.trust_remote_code
    assert params.calibration.dataset != params.evaluate.dataset
    tuned_on = params.calibration.sets[params.recipes["w4g128"].calibration]
    assert tuned_on.queries > 0
    assert tuned_on.pages > 0


def test_commented_examples_become_recipes_when_uncommented(tmp_path: Path) -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    start = lines.index("recipes:")
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("# ----"))
    examples = [re.sub(r"^  # ", "  ", line) for line in lines[start:end]]
    text = "\n".join(lines[:start] + examples + lines[end:]) + "\n"
    text = re.sub(
        r"(sensitivity:\n.*\n  calibration:) none", r"\1 mixed", text
    )  # what a budget needs
    added = load(tmp_path, text).recipes
    assert len(added) > len(load_params(Params, SHIPPED).recipes)
    assert {3, 2} <= {recipe.bits for recipe in added.values()}
    assert 32 in {recipe.group_size for recipe in added.values()}


@pytest.mark.parametrize("section", SECTIONS)
def test_each_key_has_a_comment_in_the_two_lines_above(section: str) -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    start = lines.index(f"{section}:")
    for key in SECTIONS[section].model_fields:
        at = next(i for i in range(start, len(lines)) if lines[i].startswith(f"  {key}:"))
        above = [line.lstrip() for line in lines[at - 2 : at]]
        assert any(line.startswith("#") for line in above), f"{section}.{key}"


def test_each_key_of_a_recipe_is_explained_above_the_recipes() -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    explained = {line.split()[1] for line in lines[: lines.index("recipes:")] if line[:2] == "# "}
    assert AutoRoundRecipe.model_fields.keys() | RtnRecipe.model_fields.keys() <= explained


# ---- What is accepted ---------------------------------------------------------------------------


def test_every_value_arrives(tmp_path: Path) -> None:
    params = load(tmp_path, GOOD)
    assert params.model_dump(exclude_defaults=True, exclude_unset=True) == parse_yaml(
        GOOD, path="params.yaml"
    )
    assert list(params.recipes) == ["tuned", "plain"]
    tuned = params.recipes["tuned"]
    assert isinstance(tuned, AutoRoundRecipe)
    assert (tuned.lr, tuned.seed, tuned.gradient_accumulate_steps) == (0.005, 7, 8)
    assert isinstance(params.recipes["plain"], RtnRecipe)


def test_unknown_recipe_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    recipes = load(tmp_path, GOOD).recipes
    with pytest.raises(UserError, match=r"recipes\.w4: no such recipe \(known: tuned, plain\)$"):
        choose_recipe(recipes, "w4")
    with pytest.raises(UserError, match=r"recipes\.tuend: no such recipe; did you mean tuned\?"):
        choose_recipe(recipes, "tuend")


@pytest.mark.parametrize(
    ("written", "meant"), [("1e-3", 0.001), ("1E-3", 0.001), ("5.0e-03", 0.005), ("0.01", 0.01)]
)
def test_exponents_are_numbers_as_dvc_reads_them(
    tmp_path: Path, written: str, meant: float
) -> None:
    text = edit("lr: 0.005", f"lr: {written}")
    recipe = load(tmp_path, text).recipes["tuned"]
    assert isinstance(recipe, AutoRoundRecipe)
    assert recipe.lr == meant == parse_yaml(text, path="params.yaml")["recipes"]["tuned"]["lr"]


@pytest.mark.parametrize("written", ["0123", "123"])
def test_leading_zero_is_no_octal(tmp_path: Path, written: str) -> None:
    assert load(tmp_path, edit("seed: 42", f"seed: {written}")).calibration.seed == 123


@pytest.mark.parametrize("line", ["", "    lr: null\n", "    lr:\n"])
def test_step_size_may_be_absent_or_null(tmp_path: Path, line: str) -> None:
    recipe = load(tmp_path, edit("    lr: 0.005\n", line)).recipes["tuned"]
    assert isinstance(recipe, AutoRoundRecipe)
    assert recipe.lr is None


@pytest.mark.parametrize("line", ["queries: 3", "pages: 2"])
def test_one_kind_of_samples_is_enough(tmp_path: Path, line: str) -> None:
    key = line.split(":")[0]
    params = load(tmp_path, edit(f"  {line}\n", f"  {key}: 0\n"))
    assert getattr(params.calibration.sets["some"], key) == 0


def test_a_set_may_have_its_own_seed(tmp_path: Path) -> None:
    sets = load(tmp_path, GOOD).calibration.sets
    assert (sets["some"].seed, sets["other"].seed) == (None, 43)


def test_plain_rounding_needs_no_set(tmp_path: Path) -> None:
    text = GOOD.replace(GOOD[GOOD.index("  sets:") : GOOD.index("recipes:")], "  sets: {}\n")
    text = text.replace(RECIPES, "recipes:\n" + PLAIN).replace(": other", ": none")
    assert load(tmp_path, text).calibration.sets == {}


def test_unknown_set_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    said = refusal(tmp_path, edit("calibration: some\n", "calibration: smoe\n"))
    assert said.endswith(
        "'smoe' is not a set of calibration.sets; did you mean some? (known: some, other)"
    )


@pytest.mark.parametrize(("line", "meant"), [("", True), ("    deepstack: false\n", False)])
def test_layers_are_tuned_on_the_truth_unless_told_otherwise(
    tmp_path: Path, line: str, meant: bool
) -> None:
    recipe = load(tmp_path, edit("    lr: 0.005\n", line)).recipes["tuned"]
    assert isinstance(recipe, AutoRoundRecipe)
    assert recipe.deepstack is meant


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_format_is_accepted(tmp_path: Path, bits: int, group_size: int) -> None:
    text = edit("bits: 4\n    group_size: 128", f"bits: {bits}\n    group_size: {group_size}")
    recipe = load(tmp_path, text).recipes["tuned"]
    assert (recipe.bits, recipe.group_size) == (bits, group_size)


@pytest.mark.parametrize(
    ("line", "table", "vision"),
    [
        ("", 16, (16, 16, 16)),
        ("token_embeddings: 8", 8, (16, 16, 16)),
        ("token_embeddings: 4", 4, (16, 16, 16)),
        ("vision: 8", 16, (8, 8, 8)),
        ("vision: {mlp: 4, mergers: 8}", 16, (16, 4, 8)),
        ("vision: {attention: 8, mlp: 16}", 16, (8, 16, 16)),
        ("vision: {}", 16, (16, 16, 16)),
    ],
)
@pytest.mark.parametrize("method", ["plain", "tuned"])
def test_more_than_the_language_model_may_be_quantized(
    tmp_path: Path, method: str, line: str, table: int, vision: tuple[int, ...]
) -> None:
    start = {"plain": "    bits: 3\n", "tuned": "    bits: 4\n"}[method]
    recipe = load(tmp_path, edit(start, f"{start}    {line}\n")).recipes[method]
    assert (recipe.token_embeddings or 16) == table
    assert recipe.vision_bits == dict(zip(("attention", "mlp", "mergers"), vision, strict=True))
    assert recipe.vision_too == (min(vision) < 16)


@pytest.mark.parametrize(
    ("line", "start", "part"),
    [
        ("token_embeddings: 3", "token_embeddings: ", "16, 8 or 4 (it is 3)"),
        ("token_embeddings: 2", "token_embeddings: ", "16, 8 or 4 (it is 2)"),
        ("token_embeddings: '8'", "token_embeddings: ", "16, 8 or 4 (it is '8')"),
        ("token_embeddings: true", "token_embeddings: ", "16, 8 or 4"),
        ("token_embeddings: {bits: 8}", "token_embeddings: ", "16, 8 or 4"),
        ("vision: {mlp: 3}", "vision.mlp: ", "16, 8 or 4 (it is 3)"),
        ("vision: {mergers: 32}", "vision.mergers: ", "16, 8 or 4 (it is 32)"),
        ("vision: {attention: '8'}", "vision.attention: ", "16, 8 or 4 (it is '8')"),
        ("vision: {attention: [8]}", "vision.attention: ", "16, 8 or 4"),
        ("vision: 5", "vision.", "16, 8 or 4 (it is 5)"),
        ("vision: all", "vision: ", "'all'"),
        ("vision: [8, 8, 8]", "vision: ", ""),
        ("vision: true", "vision: ", ""),
        ("vision: {merger: 8}", "vision.merger: ", "unknown key; did you mean mergers?"),
        ("vision: {projection: 8}", "vision.projection: ", "unknown key"),
        ("linears: all", "linears: ", "unknown key"),
        ("linears: text", "linears: ", "unknown key"),
        ("embeddings: 8", "embeddings: ", "unknown key; did you mean token_embeddings?"),
    ],
)
@pytest.mark.parametrize("method", ["plain", "tuned"])
def test_errors_of_what_else_is_quantized_name_the_key(
    tmp_path: Path, method: str, line: str, start: str, part: str
) -> None:
    bits = {"plain": "    bits: 3\n", "tuned": "    bits: 4\n"}[method]
    said = refusal(tmp_path, edit(bits, f"{bits}    {line}\n"))
    assert said.startswith(f"recipes.{method}.{start}")
    assert part in said


@pytest.mark.parametrize(
    ("value", "start", "part"),
    [
        ("{steps: 0}", ".steps: ", "greater than or equal to 1 (it is 0)"),
        ("{steps: 1.5}", ".steps: ", "(it is 1.5)"),
        ("{codes_lr: 0.01}", ".steps: ", "is missing; add it"),
        ("{}", ".steps: ", "is missing; add it"),
        ("{steps: 9, codes_lr: 0.2}", ".codes_lr: ", "0.1 (it is 0.2)"),
        ("{steps: 9, scales_lr: .nan}", ".scales_lr: ", "(it is nan)"),
        ("{steps: 9, seed: -1}", ".seed: ", "(it is -1)"),
        ("{steps: 9, code_lr: 0.1}", ".code_lr: ", "unknown key; did you mean codes_lr?"),
        ("{steps: 9, iterations: 1}", ".iterations: ", "unknown key; remove it"),
        ("{steps: 9, codes_lr: 0, scales_lr: 0}", ": ", "both 0, which tunes nothing"),
        ("200", ": ", "must be keys such as {steps: 200}, or null for none (it is 200)"),
        ("true", ": ", "must be keys such as {steps: 200}, or null for none (it is True)"),
        ("[]", ": ", "must be keys such as {steps: 200}, or null for none (it is [])"),
    ],
)
def test_errors_of_end_to_end_name_the_key(
    tmp_path: Path, value: str, start: str, part: str
) -> None:
    said = refusal(tmp_path, edit("    seed: 7\n", f"    seed: 7\n    end_to_end: {value}\n"))
    assert said.startswith(f"recipes.tuned.end_to_end{start}")
    assert part in said


def test_rounding_to_nearest_has_no_end_to_end(tmp_path: Path) -> None:
    for value in ("{steps: 9}", "{stops: 9}"):
        said = refusal(tmp_path, edit("    bits: 3\n", f"    bits: 3\n    end_to_end: {value}\n"))
        assert said.startswith("recipes.plain.end_to_end: unknown key")


def test_end_to_end_needs_the_activations_of_the_model(tmp_path: Path) -> None:
    lines = "    seed: 7\n    deepstack: false\n    end_to_end: {steps: 9}\n"
    said = refusal(tmp_path, edit("    seed: 7\n", lines))
    assert said.startswith("recipes.tuned: end_to_end needs the activations of the model")


def test_gptq_by_the_whole_model_needs_its_activations() -> None:
    weights: dict[str, Any] = {"bits": 4, "group_size": 128, "sym": True, "calibration": "some"}
    assert GptqRecipe(method="gptq", **weights).hessian == "layer"
    with pytest.raises(ValueError, match="hessian: model needs the activations of the model"):
        GptqRecipe(method="gptq", hessian="model", deepstack=False, **weights)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("      queries: 3", "      queries: 1"),
        ("      pages: 2", "      pages: 1"),
        ("      passages: 0", "      passages: 1"),
    ],
)
def test_end_to_end_needs_two_samples_of_a_kind(tmp_path: Path, old: str, new: str) -> None:
    text = edit("    seed: 7\n", "    seed: 7\n    end_to_end: {steps: 9}\n")
    assert load(tmp_path, text)
    said = refusal(tmp_path, text.replace(old, new))
    assert said.startswith(f"calibration.sets.some.{new.split()[0][:-1]} is 1, but recipes.tuned.")
    assert said.endswith("set 2 or more, or 0")


@pytest.mark.parametrize("name", ["a", "4bit", "w4g128-2", "w_4", "models", "rtn", "autoround"])
def test_recipe_names_may_be(tmp_path: Path, name: str) -> None:
    assert name in load(tmp_path, edit("  plain:", f"  {name}:")).recipes


@pytest.mark.parametrize("encode", [b"\xef\xbb\xbf".__add__, lambda b: b.replace(b"\n", b"\r\n")])
def test_files_saved_by_windows_load(tmp_path: Path, encode: object) -> None:
    assert callable(encode)
    assert load(tmp_path, encode(GOOD.encode())) == load(tmp_path, GOOD)


def test_params_cannot_be_changed(tmp_path: Path) -> None:
    params = load(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        params.calibration.seed = 1


# ---- What is refused ----------------------------------------------------------------------------

BAD = [
    # YAML 1.2: words are no booleans, quoted numbers no numbers
    ("sym: true", "sym: yes", "recipes.tuned.sym: ", "'yes'"),
    ("sym: true", "sym: on", "recipes.tuned.sym: ", "'on'"),
    ("trust_remote_code: false", "trust_remote_code: no", "model.trust_remote_code: ", "'no'"),
    ("lr: 0.005", "lr: '1e-3'", "recipes.tuned.lr: ", "'1e-3'"),
    ("seed: 42", "seed: 1:30", "calibration.seed: ", "'1:30'"),
    # unknown keys
    ("compute:", "computer: 1\ncompute:", "computer: ", "unknown key"),
    ("      queries: 3", "      queries: 3\n      querys: 3", "calibration.sets.some.querys: ", "unknown key"),
    ("  device:", "  devices: 2\n  device:", "compute.devices: ", "unknown key"),
    ("    iters:", "    iter: 3\n    iters:", "recipes.tuned.iter: ", "unknown key"),
    ("    method: rtn", "    method: rtn\n    iters: 50", "recipes.plain.iters: ", "unknown key"),
    ("    method: rtn", "    method: rtn\n    lr: 0.1", "recipes.plain.lr: ", "unknown key"),
    ("    method: rtn", "    method: rtn\n    seed: 1", "recipes.plain.seed: ", "unknown key"),
    # missing keys
    ("  source: some/model\n", "", "model.source: ", "is missing"),
    ("  revision: null\n", "", "model.revision: ", "is missing"),
    ("  max_bytes: null\n", "", "gate.max_bytes: ", "is missing"),
    ("    bits: 4\n", "", "recipes.tuned: ", "needs one of bits and bytes"),
    ("    iters: 50\n", "", "recipes.tuned.iters: ", "is missing"),
    ("    seed: 7\n", "", "recipes.tuned.seed: ", "is missing"),
    ("compute:\n  device: auto\n", "", "compute: ", "is missing"),
    (RECIPES, "", "recipes: ", "is missing"),
    ("    method: rtn\n", "", "recipes.plain: ", "lacks the key method"),
    # wrong kinds
    ("queries: 3", "queries: '3'", "calibration.sets.some.queries: ", "'3'"),
    ("queries: 3", "queries: three", "calibration.sets.some.queries: ", "'three'"),
    ("queries: 3", "queries: true", "calibration.sets.some.queries: ", "True"),
    ("queries: 3", "queries: 3.0", "calibration.sets.some.queries: ", "3.0"),
    ("queries: 3", "queries: 3e0", "calibration.sets.some.queries: ", "3.0"),
    ("queries: 3", "queries: [3]", "calibration.sets.some.queries: ", "[3]"),
    ("queries: 3", "queries:", "calibration.sets.some.queries: ", "None"),
    ("iters: 50", "iters: 50.5", "recipes.tuned.iters: ", "50.5"),
    ("iters: 50", "iters: false", "recipes.tuned.iters: ", "False"),
    ("lr: 0.005", "lr: true", "recipes.tuned.lr: ", "True"),
    ("bits: 4", "bits: '4'", "recipes.tuned.bits: ", "'4'"),
    ("bits: 4", "bits: true", "recipes.tuned.bits: ", "True"),
    ("sym: true", "sym: 1", "recipes.tuned.sym: ", "1"),
    ("source: some/model", "source: 5", "model.source: ", "5"),
    ("source: some/model", "source: ''", "model.source: ", "''"),
    ("revision: null", "revision: 1234567", "model.revision: ", "1234567"),
    ("dataset: some/evaluation", "dataset: 2026-11-23", "evaluate.dataset: ", "2026"),
    ("model:\n  source: some/model\n", "model:\n", "model.source: ", "is missing"),
    ("compute:\n  device: auto", "compute: auto", "compute: ", "'auto'"),
    ("compute:\n  device: auto", "compute:", "compute: ", "None"),
    # wrong values
    ("bits: 4", "bits: 5", "recipes.tuned.bits: ", "average between them such as 3.5 (it is 5)"),
    ("bits: 4", "bits: 16", "recipes.tuned.bits: ", "2, 3, 4 or 8, or an average"),
    ("size: 128", "size: 100", "recipes.tuned.group_size: ", "32, 64 or 128 (it is 100)"),
    ("size: 128", "size: -1", "recipes.tuned.group_size: ", "32, 64 or 128 (it is -1)"),
    ("sym: true", "sym: false", "recipes.tuned.sym: ", "asymmetric checkpoints cannot be loaded"),
    ("sym: True", "sym: false", "recipes.plain.sym: ", "asymmetric checkpoints cannot be loaded"),
    (
        "method: rtn", "method: awq", "recipes.plain: ",
        "method must be autoround, gptq or rtn (it is 'awq')",
    ),
    ("method: rtn", "method: RTN", "recipes.plain: ", "method must be autoround, gptq or rtn"),
    ("method: rtn", "method:", "recipes.plain: ", "method must be autoround, gptq or rtn"),
    ("queries: 3", "queries: -1", "calibration.sets.some.queries: ", "-1"),
    ("pages: 2", "pages: -1", "calibration.sets.some.pages: ", "-1"),
    ("3\n      pages: 2", "0\n      pages: 0", "calibration.sets.some: ", "all 0"),
    ("passages: 4", "passages: -4", "calibration.sets.other.passages: ", "-4"),
    ("seed: 43", "seed: -43", "calibration.sets.other.seed: ", "-43"),
    ("    some:", "    So me:", "calibration.sets: ", "'So me' is not allowed"),
    ("    some:", "    none:", "calibration.sets: ", "'none' is reserved"),
    ("    some:", "    any: 3\n    some:", "calibration.sets.any: ", "3"),
    ("calibration: some\n", "calibration: smoe\n", "recipes.tuned.calibration: ", "'smoe' is not a set"),
    ("calibration: some\n", "calibration: none\n", "recipes.tuned.calibration: ", "'none' is not a set"),
    ("calibration: some\n", "calibration: null\n", "recipes.tuned.calibration: ", "None"),
    ("    calibration: some\n", "", "recipes.tuned.calibration: ", "is missing"),
    ("calibration: none", "calibration: some", "recipes.plain.calibration: ", "'some'"),
    ("    calibration: none\n", "", "recipes.plain.calibration: ", "is missing"),
    ("    method: rtn", "    method: rtn\n    deepstack: true", "recipes.plain.deepstack: ", "unknown key"),
    ("    iters:", "    deepstack: 0\n    iters:", "recipes.tuned.deepstack: ", "0"),
    ("seed: 42", "seed: -1", "calibration.seed: ", "-1"),
    ("iters: 50", "iters: -1", "recipes.tuned.iters: ", "-1"),
    ("seed: 7", "seed: -7", "recipes.tuned.seed: ", "-7"),
    ("lr: 0.005", "lr: -0.005", "recipes.tuned.lr: ", "-0.005"),
    ("lr: 0.005", "lr: 0", "recipes.tuned.lr: ", "0"),
    ("lr: 0.005", "lr: .nan", "recipes.tuned.lr: ", "nan"),
    ("lr: 0.005", "lr: .inf", "recipes.tuned.lr: ", "inf"),
    (
        "    lr: 0.005",
        "    gradient_accumulate_steps: 0",
        "recipes.tuned.gradient_accumulate_steps: ",
        "0",
    ),
    ("tokens: 1280", "tokens: 3", "model.max_num_visual_tokens: ", "3"),
    ("batch: 16", "batch: 0", "embed.queries_per_batch: ", "0"),
    ("batch: 1281", "batch: -1", "embed.visual_tokens_per_batch: ", "-1"),
    ("dtype: float32", "dtype: float16", "embed.dtype: ", "'float16'"),
    ("dtype: bfloat16", "dtype: int8", "benchmark.dtype: ", "'int8'"),
    ("query_tokens: 26", "query_tokens: 10", "benchmark.query_tokens: ", "10"),
    ("query_batches: [1, 8]", "query_batches: []", "benchmark.query_batches: ", "[]"),
    ("page_batches: [1]", "page_batches: [65]", "benchmark.page_batches.0: ", "65"),
    ("warmup: 0", "warmup: -1", "benchmark.warmup: ", "-1"),
    ("repeats: 10", "repeats: 0", "benchmark.repeats: ", "0"),
    ("min_query_cosine: 0.95", "min_query_cosine: 95", "gate.min_query_cosine: ", "95"),
    ("min_query_cosine: 0.95", "min_query_cosine: .nan", "gate.min_query_cosine: ", "nan"),
    ("drop: 0.05", "drop: -0.05", "gate.max_ndcg_at_5_drop: ", "-0.05"),
    ("drop: 0.05", "drop: .nan", "gate.max_ndcg_at_5_drop: ", "nan"),
    ("max_bytes: null", "max_bytes: 0", "gate.max_bytes: ", "0"),
    ("device: auto", "device: gpu", "compute.device: ", "'gpu'"),
    # the table of recipes
    (RECIPES, "recipes: {}\n", "recipes: ", "is empty"),
    (RECIPES, "recipes:\n", "recipes: ", "None"),
    (RECIPES, "recipes: [w4]\n", "recipes: ", "['w4']"),
    (PLAIN, "  plain: rtn\n", "recipes.plain: ", "'rtn'"),
    (PLAIN, "  plain:\n", "recipes.plain: ", "None"),
    ("  plain:", "  a/b:", "recipes: ", "'a/b' is not allowed"),
    ("  plain:", "  ../b:", "recipes: ", "'../b' is not allowed"),
    ("  plain:", "  W4:", "recipes: ", "'W4' is not allowed"),
    ("  plain:", "  -w4:", "recipes: ", "'-w4' is not allowed"),
    ("  plain:", "  w4.5:", "recipes: ", "'w4.5' is not allowed"),
    ("  plain:", "  w4@2:", "recipes: ", "'w4@2' is not allowed"),
    ("  plain:", "  'w 4':", "recipes: ", "'w 4' is not allowed"),
    ("  plain:", "  ä:", "recipes: ", "'ä' is not allowed"),
    ("  plain:", "  '':", "recipes: ", "'' is not allowed"),
    ("  plain:", '  "w4\\n":', "recipes: ", "'w4\\n' is not allowed"),
    ("  plain:", "  4:", "recipes.4", "string"),
    ("  plain:", "  null:", "recipes.None", "string"),
    *(("  plain:", f"  {n}:", "recipes: ", f"{n!r} is reserved") for n in TAKEN),
    # one line for several problems
    ("bits: 4\n    group_size: 128", "bits: 5\n    group_size: 1", "recipes.tuned.bits", "1 more"),
    # no valid YAML
    ("model:", "model: [", "is not valid YAML ", "line"),
    ("  device: auto", "\tdevice: auto", "is not valid YAML ", "line"),
    ("  device: auto", "  device: auto\n  device: cpu", "is not valid YAML ", "duplicate"),
    ("compute:", "---\ncompute:", "is not valid YAML ", "single document"),
    ("source: some/model", "source: !path some/model", "is not valid YAML ", "!path"),
    ("source: some/model", "source: \0", "is not valid YAML ", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "start", "part"),
    BAD,
    ids=[f"{i}:{case[1][:30]!r}" for i, case in enumerate(BAD)],
)
def test_one_line_names_file_and_key(
    tmp_path: Path, old: str, new: str, start: str, part: str
) -> None:
    said = refusal(tmp_path, edit(old, new))
    assert said.startswith(start)
    assert part in said


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (b"", "the file: "),
        (b"# only a comment\n", "the file: "),
        (b"- model\n- recipes\n", "the file: "),
        (b"model\n", "the file: "),
        (b"5", "the file: "),
        (b"{}", "model: is missing; add it (and 8 more)"),
        (b"\xff\xfe\x00", "is not valid YAML "),
        (b"\x89PNG\r\n\x1a\n", "is not valid YAML "),
        (b"!!python/object/apply:os.system ['touch canary']\n", "is not valid YAML "),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, text: bytes, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(tmp_path, text).startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "params.yaml", tmp_path):
        with pytest.raises(UserError) as caught:
            load_params(Params, path)
        assert str(caught.value).startswith(f"{path}: cannot be read (")


def test_the_name_of_the_original_is_reserved() -> None:
    """A recipe `x` writes artifacts/embeddings/x.safetensors, beside that of the original."""
    dvc = parse_yaml(Path("dvc.yaml").read_text(encoding="utf-8"), path="dvc.yaml")["stages"]
    outs = [
        out if isinstance(out, str) else next(iter(out))
        for stage in dvc.values()
        for kind in ("outs", "metrics", "plots")
        for out in stage.get("do", stage).get(kind, [])
    ]
    templates = {out for out in outs if "${key}" in out}
    fixed = {out for out in outs if "${key}" not in out}
    for template in templates:
        pattern = re.escape(template).replace(re.escape("${key}"), "([^/]+)")
        taken = {match[1] for out in fixed if (match := re.fullmatch(pattern, out))}
        assert taken <= RESERVED_NAMES
        if template.startswith("artifacts/embeddings/"):
            assert taken == {"original"}


@pytest.mark.parametrize(("old", "new"), [("bits: 4", "bits: 4.0"), ("size: 128", "size: 128.0")])
def test_floats_are_no_formats(tmp_path: Path, old: str, new: str) -> None:
    assert refusal(tmp_path, edit(old, new)).startswith("recipes.tuned.")


@pytest.mark.parametrize(
    "value",
    ["2026-99-99", "!!int x", "!!float x", "!!bool x", "9" * 5000, "{a: " * 1000],
    ids=lambda value: value[:12],
)
def test_yaml_that_ruamel_cannot_construct_is_one_line(tmp_path: Path, value: str) -> None:
    assert refusal(tmp_path, f"model: {value}\n")


@pytest.mark.parametrize(
    ("old", "new"), [("compute:", '"a\\nb": 1\ncompute:'), ("device: auto", "device: " + "x" * 900)]
)
def test_the_line_stays_one_short_line(tmp_path: Path, old: str, new: str) -> None:
    assert refusal(tmp_path, edit(old, new))


def test_keys_called_like_a_method_are_named(tmp_path: Path) -> None:
    text = edit("  plain:", "  rtn:").replace("bits: 3", "bits: 5")
    assert refusal(tmp_path, text).startswith("recipes.rtn.bits: ")
    assert refusal(tmp_path, edit("compute:", "rtn: 1\ncompute:")).startswith("rtn: ")


@pytest.mark.parametrize("revision", ["main", "''", "6a32fb6", "'../../x'"])
def test_revisions_are_commits(tmp_path: Path, revision: str) -> None:
    said = refusal(tmp_path, edit("revision: null", f"revision: {revision}"))
    assert said.startswith("model.revision: ")


@pytest.mark.parametrize(
    ("old", "key"), [("seed: 42", "calibration"), ("seed: 7", "recipes.tuned")]
)
def test_seeds_fit_the_generators(tmp_path: Path, old: str, key: str) -> None:
    assert refusal(tmp_path, edit(old, f"seed: {2**64}")).startswith(f"{key}.seed: ")


# ---- Unknown keys -------------------------------------------------------------------------------


MISSPELT = [
    ("    group_size: 128", "    groupsize: 128", "recipes.tuned.groupsize", "group_size"),
    ("    iters: 50", "    iter: 50", "recipes.tuned.iter", "iters"),
    ("  max_bytes:", "  max_byte:", "gate.max_byte", "max_bytes"),
    ("compute:", "computer:", "computer", "compute"),
    ("   queries: 3", "   querys: 3", "calibration.sets.some.querys", "queries"),
    ("    method: rtn", "    method: rtn\n    visoin: 8", "recipes.plain.visoin", "vision"),
    (
        "    bits: 3",
        "    bits: 3\n    vision: {mergrs: 8}",
        "recipes.plain.vision.mergrs",
        "mergers",
    ),
]
FOREIGN = [
    ("    method: rtn", "    method: rtn\n    iters: 50", "recipes.plain.iters", "remove it"),
    ("    bits: 3", "    bits: 3\n    format: gguf", "recipes.plain.format", "it belongs in release.plain.format"),
    ("    bits: 3", "    bits: 3\n    fallback: tuned", "recipes.plain.fallback", "it belongs in fallbacks.plain"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "key", "advice"),
    [*((a, b, key, f"did you mean {right}?") for a, b, key, right in MISSPELT), *FOREIGN],
)
def test_a_misspelt_key_is_named_before_what_is_missing_because_of_it(
    tmp_path: Path, old: str, new: str, key: str, advice: str
) -> None:
    assert refusal(tmp_path, edit(old, new)).startswith(f"{key}: unknown key; {advice}")


@pytest.mark.parametrize(("iters", "lr"), [(5, "null"), (9, "null"), (10, "null"), (50, "0.1")])
def test_step_sizes_that_cannot_work_are_refused(tmp_path: Path, iters: int, lr: str) -> None:
    text = edit("iters: 50", f"iters: {iters}").replace("lr: 0.005", f"lr: {lr}")
    said = refusal(tmp_path, text)
    assert said.startswith("recipes.tuned: step size 0.")
    assert "set lr" in said


@pytest.mark.parametrize(("iters", "lr"), [(0, "null"), (11, "null"), (5, "0.005")])
def test_other_step_sizes_are_accepted(tmp_path: Path, iters: int, lr: str) -> None:
    text = edit("iters: 50", f"iters: {iters}").replace("lr: 0.005", f"lr: {lr}")
    assert load(tmp_path, text).recipes["tuned"]


# ---- Formats and fallbacks ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto_awq", "mlx"])
def test_a_format_that_cannot_hold_the_model_is_refused_with_the_reason(
    tmp_path: Path, name: str
) -> None:
    said = refusal(tmp_path, GOOD + f"release: {{plain: {{format: {name}}}}}\n")
    assert said.startswith(f"release.plain.format: cannot be {name}: ")
    assert "ColQwen3" in said


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("release: {plain: {format: llm_compressor}}", "takes 4 or 8 bits, not 3"),
        (
            "release: {plain: {format: fp8}}",
            "'auto_round', 'auto_gptq', 'llm_compressor' or 'gguf'",
        ),
        ("release: {plian: {format: auto_gptq}}", "no such recipe; did you mean plain?"),
        ("release: {plain: {formt: auto_gptq}}", "unknown key; did you mean format?"),
        ("release: {plain: {even_if_worse: 1}}", "release.plain.even_if_worse"),
        (
            "serving: {plian: {activations: int8}}",
            "serving.plian: no such recipe; did you mean plain?",
        ),
        ("serving: {plain: {activations: float8}}", "serving.plain.activations: "),
        ("serving: {plain: {activation: int8}}", "unknown key; did you mean activations?"),
        ("fallbacks: {plain: tuned}", "is tuned on"),
        ("fallbacks: {plain: plain}", "is not another recipe (known: tuned)"),
        ("fallbacks: {plain: other}", "is not another recipe (known: tuned)"),
        ("fallbacks: {plian: tuned}", "no such recipe; did you mean plain?"),
    ],
)
def test_impossible_formats_and_fallbacks_are_refused(
    tmp_path: Path, line: str, reason: str
) -> None:
    assert reason in refusal(tmp_path, GOOD + line + "\n")


def test_gguf_takes_every_number_of_bits_but_two(tmp_path: Path) -> None:
    line = "release: {plain: {format: gguf}}\n"
    for bits in (3, 4, 8):
        for vision in (16, 8, 4):
            text = edit("    bits: 3\n", f"    bits: {bits}\n    vision: {vision}\n")
            assert load(tmp_path, text + line).release["plain"].format == "gguf"
    said = refusal(tmp_path, edit("    bits: 3\n", "    bits: 2\n") + line)
    assert "release.plain.format: gguf takes 3, 4 or 8 bits, not 2: llama.cpp's only type" in said


def test_a_format_of_one_list_of_blocks_cannot_hold_the_vision_tower(tmp_path: Path) -> None:
    text = edit("    bits: 3\n", "    bits: 3\n    vision: {mergers: 8}\n")
    said = refusal(tmp_path, text + "release: {plain: {format: auto_gptq}}\n")
    assert "auto_gptq cannot hold a recipe that quantizes the vision tower" in said


def test_a_format_of_one_width_cannot_hold_a_budget(tmp_path: Path) -> None:
    text = edit("    bits: 3\n    group_size: 32", "    bits: 3.5\n    group_size: 64")
    said = refusal(tmp_path, text + "release: {plain: {format: auto_gptq}}\n")
    assert said.startswith("release.plain.format: auto_gptq ")


def test_formats_and_fallbacks_arrive(tmp_path: Path) -> None:
    text = edit("    bits: 3\n", "    bits: 4\n")
    params = load(
        tmp_path,
        text + "release: {plain: {format: llm_compressor}}\nfallbacks: {tuned: plain}\n",
    )
    assert (params.release["plain"].format, params.fallbacks) == (
        "llm_compressor",
        {"tuned": "plain"},
    )
    assert "tuned" not in params.release
