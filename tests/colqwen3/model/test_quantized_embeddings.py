"""Token embeddings in 8 and 4 bits against rounding and packing done by hand with numpy."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from colqwen3.checkpoint.layout import EMBEDDINGS, linears
from colqwen3.model.loading import load_model
from colqwen3.model.modeling_colqwen3 import QuantizedEmbedding
from stages.quantization.allocation import Allocation
from tests.helpers.by_hand import dense_table
from tests.helpers.refusal import refusal
from tests.helpers.rounded import allocated

GOLDEN, CPU, GROUP = Path("tests/golden/model"), torch.device("cpu"), 32
CONFIG: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture(scope="module", params=[8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folder(bits: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with quantized linears and token embeddings."""
    allocation = Allocation(dict.fromkeys(linears(CONFIG), 4), bits)
    return allocated(GOLDEN, tmp_path_factory.mktemp(f"embeddings{bits}"), allocation)


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def table(stored: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    return torch.from_numpy(dense_table(stored, bits))


def embedding(stored: dict[str, torch.Tensor], bits: int) -> QuantizedEmbedding:
    text = CONFIG["text_config"]
    module = QuantizedEmbedding(text["vocab_size"], text["hidden_size"], bits, GROUP)
    module.load_state_dict(
        {part: stored[f"{EMBEDDINGS}.{part}"] for part in ("weight_packed", "weight_scale")}
    )
    return module


def test_bytes_are_those_packed_by_hand(stored: dict[str, torch.Tensor], bits: int) -> None:
    name = f"{EMBEDDINGS}.weight"
    (weight,) = [
        tensors[name].float().numpy()
        for tensors in map(load_file, GOLDEN.glob("*.safetensors"))
        if name in tensors
    ]
    groups = weight.reshape(len(weight), -1, GROUP)
    most, half = groups.max(-1), 2 ** (bits - 1)
    sign = np.where(most >= -groups.min(-1), -1, 1)
    scale = (sign * np.abs(groups).max(-1) / half).astype(np.float16)
    codes = np.clip(np.round(groups / scale[..., None].astype(np.float32)), -half, half - 1) + half
    codes = codes.reshape(len(weight), -1).astype(np.uint8)
    data = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    packed = stored[f"{EMBEDDINGS}.weight_packed"]
    assert (packed.dtype, packed.shape) == (torch.int32, (448, 128 * bits // 32))
    assert packed.numpy().tobytes() == np.ascontiguousarray(data).tobytes()
    assert stored[f"{EMBEDDINGS}.weight_scale"].numpy().tobytes() == scale.tobytes()
    assert name not in stored


def test_the_dense_loader_and_the_module_give_the_weights_read_by_hand(
    folder: Path, stored: dict[str, torch.Tensor], table: torch.Tensor, bits: int
) -> None:
    dense: Any = load_model(folder, torch.float32, CPU).get_input_embeddings()
    assert torch.equal(dense.weight, table)
    module, ids = embedding(stored, bits), torch.tensor([[0, 447, 31], [5, 5, 200]])
    assert torch.equal(module(ids), table[ids])
    assert torch.equal(module(torch.arange(448)), table)
    assert module(torch.empty(1, 0, dtype=torch.long)).shape == (1, 0, 128)


def test_a_cast_changes_nothing_but_the_dtype_of_the_output(
    stored: dict[str, torch.Tensor], table: torch.Tensor, bits: int
) -> None:
    module, ids = embedding(stored, bits), torch.arange(448)
    scales, packed = module.weight_scale.clone(), module.weight_packed.clone()
    for cast, dtype in (
        (module.half, torch.float16),
        (lambda: module.to(torch.bfloat16), torch.bfloat16),
        (lambda: module.to("cpu"), torch.bfloat16),
        (module.float, torch.float32),
    ):
        cast()
        assert module(ids).dtype == dtype
        assert torch.equal(module(ids), table.to(dtype))
        assert module.weight_scale.dtype == torch.float32
        assert torch.equal(module.weight_scale, scales)
        assert torch.equal(module.weight_packed, packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_keeps_the_scales_as_they_are(
    folder: Path, stored: dict[str, torch.Tensor], table: torch.Tensor, dtype: torch.dtype
) -> None:
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    module = model.get_input_embeddings()
    assert isinstance(module, QuantizedEmbedding)
    assert module.weight_scale.dtype == torch.float32
    assert torch.equal(module.weight_scale, stored[f"{EMBEDDINGS}.weight_scale"].float())
    assert torch.equal(module.weight_packed, stored[f"{EMBEDDINGS}.weight_packed"])
    out = module(torch.arange(448))
    assert out.dtype == model.embedding_proj_layer.weight.dtype
    assert torch.equal(out, table.to(out.dtype))


def test_a_model_saved_by_transformers_keeps_its_table(
    folder: Path, stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for part in ("weight_packed", "weight_scale"):
        name = f"{EMBEDDINGS}.{part}"
        assert torch.equal(saved[name].to(stored[name].dtype), stored[name])


def test_other_widths_and_sizes_are_refused() -> None:
    for bits, group_size in ((3, 32), (16, 32), (8, 48), (8, 0)):
        with pytest.raises(ValueError, match=f"token embeddings in {bits} bits"):
            QuantizedEmbedding(4, 64, bits, group_size)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(folder: Path, tmp_path: Path, value: float) -> None:
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{EMBEDDINGS}.weight_scale"][7, 1] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinite" in refusal(load_model, copy, torch.float32, CPU)
