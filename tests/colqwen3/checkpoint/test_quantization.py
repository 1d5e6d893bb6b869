"""A config.json that says other things than its tensors is refused, by every loader, in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.layout import BLOCKS, EMBEDDINGS, linears
from colqwen3.gguf.export import export_gguf
from colqwen3.model.loading import load_model
from colqwen3.serving import load_runtime
from stages.quantization.allocation import Allocation
from tests.helpers.refusal import refusal
from tests.helpers.rounded import allocated

GOLDEN, CPU, F32 = Path("tests/golden/model"), torch.device("cpu"), torch.float32
CONFIG: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
WIDE, USUAL = f"{BLOCKS}.1.mlp.down_proj", f"{BLOCKS}.2.mlp.down_proj"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    allocation = Allocation({**dict.fromkeys(linears(CONFIG), 4), WIDE: 8}, 8)
    folder = allocated(GOLDEN, tmp_path_factory.mktemp("sound"), allocation)
    # else the sections of its rotary embeddings are beyond llama.cpp
    edit(folder, lambda c: c["text_config"]["rope_scaling"].update(mrope_section=[6, 5, 5]))
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def edit(folder: Path, change: Change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def extra(module: str, **values: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        own = config["quantization_config"]["extra_config"]
        own[module] = {**own.get(module, {}), **values}

    return change


def table(value: Any) -> Change:
    return lambda config: config.update(quantized_token_embeddings=value)


LIES: dict[str, tuple[Change, str]] = {
    "other bits of a linear": (extra(WIDE, bits=4), f"gives {WIDE} 4 bits, its tensors have others"),
    "bits of the usual": (extra(USUAL, bits=3), f"gives {USUAL} 3 bits, its tensors have others"),
    "nothing of a linear": (
        lambda c: c["quantization_config"].pop("extra_config"),
        f"gives {WIDE} 4 bits, its tensors have others",
    ),
    "other bits of all": (
        lambda c: c["quantization_config"].update(bits=3), "3 bits, its tensors have others"
    ),
    "bits that there are not": (extra(WIDE, bits=5), f"bits of {WIDE} are not 2, 3, 4 or 8"),
    "another group size": (extra(WIDE, group_size=64), f"group_size of {WIDE} is 64, only that of"),
    "other zero points": (extra(WIDE, sym=False), f"sym of {WIDE} is False, only that of the whole"),
    "an unquantized linear": (
        extra("vlm.model.visual.merger.linear_fc1", bits=8),
        "names vlm.model.visual.merger.linear_fc1, which is not quantized",
    ),
    "a list": (
        lambda c: c["quantization_config"].update(extra_config=[]), "extra_config is not an object"
    ),
    "no token embeddings": (
        lambda c: c.pop("quantized_token_embeddings"), "does not give bits and group_size"
    ),
    "token embeddings in other bits": (
        table({"bits": 4, "group_size": 32}), "which the tensors do not have"
    ),
    "token embeddings in no such bits": (
        table({"bits": 16, "group_size": 32}), "says 16 bits, which the tensors do not have"
    ),
    "token embeddings in other groups": (
        table({"bits": 8, "group_size": 64}), "which the tensors do not have"
    ),
    "token embeddings without groups": (table({"bits": 8}), "does not give bits and group_size"),
    "token embeddings as a number": (table(8), "does not give bits and group_size"),
    "token embeddings as words": (
        table({"bits": "8", "group_size": "32"}), "which the tensors do not have"
    ),
    "token embeddings in groups of a word": (
        table({"bits": 8, "group_size": "32"}), "which the tensors do not have"
    ),
}  # fmt: skip


def export(folder: Path) -> None:
    export_gguf(folder, folder.parent)


def test_the_truth_is_accepted(folder: Path) -> None:
    for read in (
        lambda: load_model(folder, F32, CPU),
        lambda: load_runtime(folder, CPU, F32),
        lambda: export(folder),
    ):
        read()


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_line(folder: Path, lie: str) -> None:
    change, said = LIES[lie]
    edit(folder, change)
    assert said in refusal(load_model, folder, F32, CPU)
    assert said in refusal(load_runtime, folder, CPU, F32)
    if lie != "an unquantized linear":  # which GGUF files hold as it is
        refusal(export, folder)


def test_token_embeddings_that_are_said_and_not_there_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for part in ("weight_packed", "weight_scale"):
        del tensors[f"{EMBEDDINGS}.{part}"]
    for shard in GOLDEN.glob("*.safetensors"):
        name = f"{EMBEDDINGS}.weight"
        tensors |= {key: value for key, value in load_file(shard).items() if key == name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (
        lambda: load_model(folder, F32, CPU),
        lambda: load_runtime(folder, CPU, F32),
        lambda: export(folder),
    ):
        assert "says 8 bits, which the tensors do not have" in refusal(read)


def test_an_original_with_token_embeddings_in_8_bits_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "model"))
    edit(folder, table({"bits": 8, "group_size": 32}))
    refusal(load_model, folder, F32, CPU)
    refusal(load_runtime, folder, CPU, F32)
    refusal(export, folder)
