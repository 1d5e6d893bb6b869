"""Inspection against numbers counted from the weights, and the models that it refuses."""

import copy
import json
import math
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen3.inspection import inspect_folder
from colqwen3.model import ColQwen3, ColQwen3Config
from tests.golden.variants import Variant, write_variant
from tests.helpers.cli import run_command
from tests.helpers.refusal import refusal as refusal_of

GOLDEN = Path("tests/golden/model")
INDEX = "model.safetensors.index.json"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Config = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def refusal(folder: Path) -> str:
    said = refusal_of(inspect_folder, folder)
    assert said.startswith(str(folder))
    return said.removeprefix(str(folder)).removeprefix(os.sep)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def shapes_of(config: Config) -> dict[str, torch.Size]:
    """Return the tensors of the real class, built without memory for its weights."""
    with torch.device("meta"):
        model: torch.nn.Module = ColQwen3(ColQwen3Config(**copy.deepcopy(config)))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def write_model(folder: Path, config: Config, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write an unsharded model of zeros whose tensors are those of the real class."""
    folder.mkdir(parents=True)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes_of(config).items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "colqwen3", **config}))
    return folder


# ---- Numbers ------------------------------------------------------------------------------------


def test_metrics_equal_a_count_of_the_weights() -> None:
    weights = load_all(GOLDEN)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    _, metrics = inspect_folder(GOLDEN)

    prefixes = {
        "vision": "vlm.model.visual.",
        "token_embeddings": "vlm.model.language_model.embed_tokens.",
        "language_model": "vlm.model.language_model.",
        "projection": "embedding_proj_layer.",
    }
    rest = dict(weights)
    for component, prefix in prefixes.items():
        part = [rest.pop(name) for name in list(rest) if name.startswith(prefix)]
        assert metrics["components"].pop(component) == {
            "tensors": len(part),
            "parameters": sum(tensor.numel() for tensor in part),
            "bytes": sum(tensor.numel() * 2 for tensor in part),
        }
    assert not rest
    assert not metrics["components"]

    parameters = sum(tensor.numel() for tensor in weights.values())
    assert metrics["total"] == {
        "tensors": len(weights), "parameters": parameters, "bytes": 2 * parameters,
    }  # fmt: skip
    assert metrics["files_bytes"] == sum(p.stat().st_size for p in GOLDEN.glob("*.safetensors"))

    linears = [t for n, t in weights.items() if ".layers." in n and n.split(".")[-2] in PROJECTIONS]
    assert len(linears) == 4 * 7
    quantizable = sum(tensor.numel() for tensor in linears)
    assert metrics["quantizable"] == {"linears": 28, "parameters": quantizable}
    # all sizes are multiples of 128 weights and 32 outputs: no padding anywhere
    assert metrics["expected_bytes"] == {
        f"w{bits}g{size}": 2 * (parameters - quantizable)
        + quantizable * bits // 8  # weights
        + quantizable // size * 2  # a float16 scale a group
        + quantizable // size * bits // 8  # a zero point a group
        for bits in (2, 3, 4, 8)
        for size in (32, 64, 128)
    }


def test_manifest_describes_the_model() -> None:
    manifest, metrics = inspect_folder(GOLDEN)
    weights = load_all(GOLDEN)
    assert manifest["model_type"] == "colqwen3"
    assert manifest["config"] == json.loads((GOLDEN / "config.json").read_text())
    assert manifest["components"] == metrics["components"]
    assert manifest["linears"] == {
        name.removesuffix(".weight"): list(weights[name].shape)
        for name in weights
        if ".language_model.layers." in name and name.split(".")[-2] in PROJECTIONS
    }
    assert manifest["unused_tensors"] == []
    assert manifest["files"].keys() == {path.name for path in GOLDEN.iterdir()}
    assert str(GOLDEN) not in json.dumps(manifest)


@pytest.mark.parametrize("variant", ["legacy", "legacy-bare", "lm_head"])
def test_other_names_and_a_stored_head_change_nothing(tmp_path: Path, variant: Variant) -> None:
    manifest, metrics = inspect_folder(GOLDEN)
    other_manifest, other = inspect_folder(write_variant(variant, tmp_path / "model"))
    metrics.pop("files_bytes")
    assert other.pop("files_bytes") == sum(
        path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")
    )
    assert other == metrics
    assert other_manifest["linears"] == manifest["linears"]
    head = ["vlm.lm_head.weight"] if variant == "lm_head" else []
    assert other_manifest["unused_tensors"] == head


@pytest.mark.parametrize(
    ("hidden", "inner", "sizes"),
    [(128, 256, [32, 64, 128]), (128, 320, [32, 64]), (96, 256, [32])],
)
def test_formats_whose_groups_do_not_fit_are_left_out(
    tmp_path: Path, hidden: int, inner: int, sizes: list[int]
) -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    config["text_config"].update(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1)
    config["vision_config"].update(out_hidden_size=hidden, depth=1, deepstack_visual_indexes=[0])
    _, metrics = inspect_folder(write_model(tmp_path / "model", config))
    assert metrics["expected_bytes"].keys() == {f"w{b}g{g}" for b in (2, 3, 4, 8) for g in sizes}


def test_bytes_follow_the_dtype_of_each_tensor(folder: Path) -> None:
    _, before = inspect_folder(folder)
    path = next(
        p for p in folder.glob("*.safetensors") if "embedding_proj_layer.bias" in load_file(p)
    )
    tensors = load_file(path)
    tensors["embedding_proj_layer.bias"] = tensors["embedding_proj_layer.bias"].float()
    save_file(tensors, path)
    _, after = inspect_folder(folder)
    added = 2 * tensors["embedding_proj_layer.bias"].numel()
    for actual, was in (
        (after["components"]["projection"], before["components"]["projection"]),
        (after["total"], before["total"]),
    ):
        assert actual == {**was, "bytes": was["bytes"] + added}
    for name, size in after["expected_bytes"].items():
        assert size == before["expected_bytes"][name] + added


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_floats_are_fine(tmp_path: Path, dtype: torch.dtype) -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    _, metrics = inspect_folder(write_model(tmp_path / "model", config, dtype))
    assert metrics["total"]["bytes"] == metrics["total"]["parameters"] * dtype.itemsize


def test_the_4b_model_is_inspected_from_its_headers(tmp_path: Path, published_4b: Config) -> None:
    """Nine gigabytes that no disk holds: the files are sparse, their data is never written."""
    shapes = shapes_of(published_4b)
    half = len(shapes) // 2
    weight_map = {}
    for file, names in (("a", list(shapes)[:half]), ("b", list(shapes)[half:])):
        header: dict[str, Any] = {}
        position = 0
        for name in names:
            end = position + 2 * shapes[name].numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [position, end]}
            weight_map[name], position = f"{file}.safetensors", end
        raw = json.dumps(header).encode()
        with (tmp_path / f"{file}.safetensors").open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + position)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "colqwen3", **published_4b}))
    _, metrics = inspect_folder(tmp_path)
    assert metrics["total"] == {
        "tensors": 715, "parameters": 4_438_635_328, "bytes": 8_877_270_656,
    }  # fmt: skip
    assert metrics["quantizable"] == {"linears": 252, "parameters": 3_633_315_840}
    assert metrics["expected_bytes"]["w4g128"] == 3_498_260_096


# ---- What is refused ----------------------------------------------------------------------------


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Set (or, with ..., remove) keys of config.json; `a__b` is key b of section a."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            *sections, last = key.split("__")
            place = config
            for section in sections:
                place = place[section]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def edit_tensor(name: str, change: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> Any:
    """Put what `change` returns in place of a tensor, index included."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        file = index["weight_map"].pop(name)
        tensors = load_file(folder / file)
        new = change(tensors.pop(name))
        save_file({**tensors, **new}, folder / file)
        index["weight_map"].update(dict.fromkeys(new, file))
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def write(text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return apply


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])


DEPTH = json.loads((GOLDEN / "config.json").read_text())["vision_config"]["depth"]
NORM = "vlm.model.language_model.norm.weight"
BIAS = "embedding_proj_layer.bias"
DOWN = "vlm.model.language_model.layers.2.mlp.down_proj.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "other model": (edit_config(model_type="qwen3_vl"), "config.json: ", "only 'colqwen3'"),
    "no model type": (edit_config(model_type=...), "config.json: ", "model_type is None"),
    "model type a list": (edit_config(model_type=["colqwen3"]), "config.json: ", "only 'colqwen3'"),
    "other class": (edit_config(architectures=["Qwen3VL"]), "config.json: ", "['Qwen3VL']"),
    "two classes": (edit_config(architectures=["ColQwen3", "B"]), "config.json: ", "supported"),
    "quantized": (
        edit_config(quantization_config={"quant_method": "auto-round"}),
        "config.json: ", "already quantized",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: ", "cannot be read"),
    "empty config": (write(""), "config.json: ", "is not valid JSON"),
    "half a config": (write('{"model_type":'), "config.json: ", "is not valid JSON"),
    "config a list": (write("[]"), "config.json: ", "not a JSON object"),
    "config null": (write("null"), "config.json: ", "not a JSON object"),
    "config bare": (write('{"model_type": "colqwen3"}'), "config.json: ", "lacks 'text_config'"),
    "text_config null": (edit_config(text_config=None), "config.json: ", "wrong size"),
    "text_config a list": (edit_config(text_config=[]), "config.json: ", "wrong size"),
    "text_config text": (edit_config(text_config="big"), "config.json: ", "wrong size"),
    "vision_config null": (edit_config(vision_config=None), "config.json: ", "wrong size"),
    "no embed_dim": (edit_config(embed_dim=...), "config.json: ", "lacks 'embed_dim'"),
    "no hidden size": (edit_config(text_config__hidden_size=...), "config.json: ", "'hidden_size'"),
    "no depth": (edit_config(vision_config__depth=...), "config.json: ", "lacks 'depth'"),
    "no patch": (edit_config(vision_config__patch_size=...), "config.json: ", "'patch_size'"),
    "layers as text": (edit_config(text_config__num_hidden_layers="4"), "config.json: ", "wrong size"),
    "layers a float": (edit_config(text_config__num_hidden_layers=4.0), "config.json: ", "wrong size"),
    "no deepstack": (
        edit_config(vision_config__deepstack_visual_indexes=None), "config.json: ", "wrong size",
    ),
    "deepstack beyond the depth": (
        edit_config(vision_config__deepstack_visual_indexes=[0, DEPTH]),
        "config.json: ", f"deepstack_visual_indexes names layers beyond the {DEPTH} of depth",
    ),
    "deepstack before the first": (
        edit_config(vision_config__deepstack_visual_indexes=[-1, 1]),
        "config.json: ", "deepstack_visual_indexes names layers beyond",
    ),
    "deepstack a float": (
        edit_config(vision_config__deepstack_visual_indexes=[0, 1.0]),
        "config.json: ", "deepstack_visual_indexes names layers beyond",
    ),
    "deepstack a truth": (
        edit_config(vision_config__deepstack_visual_indexes=[0, True]),
        "config.json: ", "deepstack_visual_indexes names layers beyond",
    ),
    "no heads": (
        edit_config(text_config__num_attention_heads=0, text_config__head_dim=None),
        "config.json: ", "wrong size",
    ),
    "fewer layers": (
        edit_config(text_config__num_hidden_layers=3), "model-", "is not a tensor of a ColQwen3",
    ),
    "more layers": (edit_config(text_config__num_hidden_layers=5), "", "lacks the tensor vlm."),
    "negative layers": (
        edit_config(text_config__num_hidden_layers=-1), "config.json: ", "num_hidden_layers is -1",
    ),
    "other vocabulary": (
        edit_config(text_config__vocab_size=449), "model-", "has shape [448, 128], config.json gives [449, 128]",
    ),
    "huge vocabulary": (edit_config(text_config__vocab_size=10**30), "config.json: ", "vocab_size is 1000"),
    "hidden size as text": (edit_config(text_config__hidden_size="128"), "config.json: ", "hidden_size is '128'"),
    "other embed_dim": (edit_config(embed_dim=64), "model-", "has shape [48], config.json gives [64]"),
    "fewer deepstack": (
        edit_config(vision_config__deepstack_visual_indexes=[0]), "model-", "is not a tensor of a ColQwen3",
    ),
    "tensor missing": (edit_tensor(NORM, lambda _: {}), "", f"lacks the tensor {NORM}"),
    "bias missing": (edit_tensor(BIAS, lambda _: {}), "", f"lacks the tensor {BIAS}"),
    "tensor unknown": (
        edit_tensor(NORM, lambda t: {NORM: t, "vlm.model.adapter.weight": t.clone()}),
        "model-", "vlm.model.adapter.weight is not a tensor",
    ),
    "tensor under two names": (
        edit_tensor(NORM, lambda t: {NORM: t, "language_model.norm.weight": t.clone()}),
        "model-", "stored under two names",
    ),
    "wrong shape": (
        edit_tensor(DOWN, lambda t: {DOWN: t.T.contiguous()}),
        "model-", f"{DOWN} has shape [256, 128], config.json gives [128, 256]",
    ),
    "one dimension more": (edit_tensor(NORM, lambda t: {NORM: t[None]}), "model-", "[1, 128]"),
    "integer weights": (
        edit_tensor(DOWN, lambda t: {DOWN: t.to(torch.int8)}), "model-", "is I8; supported are BF16",
    ),
    "8-bit floats": (
        edit_tensor(DOWN, lambda t: {DOWN: t.to(torch.float8_e4m3fn)}), "model-", "is F8_E4M3",
    ),
    "double floats": (edit_tensor(NORM, lambda t: {NORM: t.double()}), "model-", "is F64"),
    "truncated": (truncate, "model-00002", "its header says"),
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_unsupported_model_is_refused_in_one_line(folder: Path, problem: str) -> None:
    damage, start, part = REFUSED[problem]
    damage(folder)
    said = refusal(folder)
    assert said.startswith(start) or not start
    assert part in said


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": ["tok.Tok", None]}),
        ("tokenizer_config.json", ["tok.Tok", None]),  # the older form, for the tokenizer alone
        ("config.json", {"AutoModel": "m.M", "AutoTokenizer": "tok.Tok"}),
    ],
)
def test_a_tokenizer_that_needs_code_is_refused(folder: Path, file: str, auto_map: object) -> None:
    """No code travels with a quantized folder: it would tokenize otherwise without a word."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "auto_map": auto_map}))
    said = refusal(folder)
    assert said.startswith(f"{file}: auto_map names code of the model's own for its tokenizer")
    assert said.endswith("remove AutoTokenizer from auto_map")


def test_code_that_we_do_without_may_be_named(folder: Path) -> None:
    """The published model's own classes are not needed here, and nothing of them runs."""
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["auto_map"] = {"AutoProcessor": "processing_colqwen3.ColQwen3Processor"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    edit_config(auto_map={"AutoModel": "modeling_colqwen3.ColQwen3"})(folder)
    assert inspect_folder(folder)[1] == inspect_folder(GOLDEN)[1]


def test_a_damaged_tokenizer_config_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: is not valid JSON" in refusal(folder)


def test_the_models_own_class_agrees_on_what_is_missing(folder: Path) -> None:
    edit_tensor(NORM, lambda _: {})(folder)
    assert f"lacks the tensor {NORM}" in refusal(folder)
    with pytest.raises(ValueError, match=f"missing keys, the first is {NORM}"):
        ColQwen3.from_pretrained(folder)


def test_absent_architectures_are_fine(folder: Path) -> None:
    edit_config(architectures=...)(folder)
    assert inspect_folder(folder)[1] == inspect_folder(GOLDEN)[1]


def test_what_the_native_class_saves_is_supported(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    del config["auto_map"], config["dtype"], config["transformers_version"]
    model = ColQwen3(ColQwen3Config(**copy.deepcopy(config))).bfloat16()
    model.save_pretrained(tmp_path / "saved", max_shard_size="900KB")
    _, metrics = inspect_folder(tmp_path / "saved")
    assert metrics["total"] == inspect_folder(GOLDEN)[1]["total"]
    assert metrics["total"]["parameters"] == sum(map(math.prod, shapes_of(config).values()))


def test_size_beyond_all_floats_is_refused(folder: Path) -> None:
    edit_config(vision_config__spatial_merge_size=1e300)(folder)
    assert refusal(folder)


def test_deeply_nested_config_is_refused(folder: Path) -> None:
    write("[" * 100_000)(folder)
    assert refusal(folder)


def test_fractional_size_is_refused(folder: Path) -> None:
    edit_config(embed_dim=48.0)(folder)
    assert refusal(folder)


def test_linears_that_auto_round_leaves_alone_are_refused(tmp_path: Path) -> None:
    """auto_round 0.16 keeps layers of out_features % 32 in 16 bits; the plan says otherwise."""
    config = json.loads((GOLDEN / "config.json").read_text())
    config["text_config"].update(
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_hidden_layers=1
    )
    config["vision_config"].update(depth=1, deepstack_visual_indexes=[0])
    assert refusal(write_model(tmp_path / "model", config))


HUGE = """
import resource, sys
from pathlib import Path
from colqwen3.inspection import inspect_folder
from colqwen3.system.errors import UserError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    inspect_folder(Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("key", ["text_config__num_hidden_layers", "vision_config__depth"])
def test_huge_declared_sizes_are_refused(folder: Path, key: str) -> None:
    edit_config(**{key: 10**9})(folder)
    done = run_command(folder, code=HUGE)
    assert done.returncode == 0
    assert done.stdout.startswith(str(folder))
