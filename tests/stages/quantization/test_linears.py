"""The order of layers and the digest of what was filled in; test_quantize.py does the rest."""

from pathlib import Path

import torch

from colqwen3.checkpoint.tensor_file import TensorFile
from stages.quantization.linears import block_digest, split_by_block, write_parts

LAYERS = "vlm.model.language_model.layers"


def test_layers_are_in_the_order_of_their_numbers() -> None:
    names = [f"{LAYERS}.{index}.mlp.{part}" for index in (10, 2, 0) for part in ("up", "down")]
    found = split_by_block({name: [1, 1] for name in names})
    assert found == [names[4:], names[2:4], names[:2]]


def test_digest_sees_a_changed_bit_of_any_part(tmp_path: Path) -> None:
    parts = {
        "qweight": torch.ones(2, 2, dtype=torch.int32),
        "qzeros": torch.ones(1, 2, dtype=torch.int32),
        "scales": torch.ones(1, 2, dtype=torch.float16),
    }
    kinds = {torch.int32: "I32", torch.float16: "F16"}
    specs = {f"a.{key}": (kinds[t.dtype], tuple(t.shape)) for key, t in parts.items()}
    digests = set()
    with TensorFile(tmp_path / "file", specs) as file:
        for changed in (None, *parts):
            made = {key: 2 * t if key == changed else t for key, t in parts.items()}
            write_parts(file, "a", made)
            digests.add(block_digest(file, ["a"]))
    assert len(digests) == 4
