"""The stage writes the bits and bytes of every recipe, and `quantize` keeps to them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from colqwen3.system.errors import UserError
from stages import allocate
from stages.inspect_model import main as inspect_main
from stages.quantize import main as quantize_main
from tests.helpers.metrics import write_json
from tests.helpers.work import RECIPES, make_work, write_params

EMBEDDINGS = "vlm.model.language_model.embed_tokens"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose model has been inspected; no sensitivity was measured."""
    folder = make_work(tmp_path / "work")
    monkeypatch.chdir(folder)
    write_json(folder / "artifacts/sensitivity.json", {})
    write_json(folder / "artifacts/calibration/none/index.json", {"samples": []})
    monkeypatch.setattr(sys, "argv", ["inspect_model"])
    inspect_main()
    monkeypatch.setattr(sys, "argv", ["allocate"])
    return folder


def allocations(folder: Path, monkeypatch: pytest.MonkeyPatch, **recipes: Any) -> dict[str, Any]:
    from ruamel.yaml import YAML

    params = YAML(typ="safe").load(folder / "params.yaml")
    params["recipes"] = recipes
    write_params(folder, params)
    monkeypatch.setattr(sys, "argv", ["allocate"])
    allocate.main()
    files = (folder / "artifacts/allocation").iterdir()
    return {path.stem: json.loads(path.read_text()) for path in files}


def test_every_recipe_has_a_file_and_what_was_is_gone(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {**RECIPES["rtn"], "token_embeddings": 8}
    first = allocations(work, monkeypatch, rtn=RECIPES["rtn"], table=table)
    assert first.keys() == {"rtn", "table"}
    assert {len(made["linears"]) for made in first.values()} == {28}
    assert (first["rtn"]["token_embeddings"], first["table"]["token_embeddings"]) == (16, 8)
    # 448 rows of 128 weights, with one group each
    assert first["rtn"]["bytes"] - first["table"]["bytes"] == 448 * (2 * 128 - 128 - 2)
    assert allocations(work, monkeypatch, rtn=RECIPES["rtn"]) == {"rtn": first["rtn"]}


def test_quantize_keeps_to_the_allocation(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = allocations(work, monkeypatch, rtn={**RECIPES["rtn"], "token_embeddings": 4})["rtn"]
    wide = next(iter(made["linears"]))
    made["linears"][wide] = 8
    write_json(work / "artifacts/allocation/rtn.json", made)
    monkeypatch.setattr(sys, "argv", ["quantize", "rtn"])
    quantize_main()
    tensors = load_file(work / "artifacts/checkpoints/rtn/model.safetensors")
    assert tensors[f"{EMBEDDINGS}.weight_packed"].shape == (448, 128 * 4 // 32)
    for name, bits in made["linears"].items():
        assert tensors[f"{name}.qweight"].shape[0] == tensors[f"{name}.scales"].shape[0] * 4 * bits
    record = json.loads((work / "artifacts/quantize/rtn.json").read_text())
    assert record["bits"] == {"token_embeddings": 4, "language_model": {"4": 27, "8": 1}}
    assert record["linears"] == {"planned": 28, "quantized": 28}
    assert EMBEDDINGS in record["relative_weight_error"]


def test_a_group_size_that_does_not_fit_is_one_line(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"recipes\.odd\.group_size is 128.* 36 inputs of .*visual"):
        allocations(work, monkeypatch, odd={**RECIPES["rtn"], "vision": {"attention": 8}})
    assert not (work / "artifacts/allocation").exists()
