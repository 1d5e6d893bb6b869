"""A checkpoint of weights rounded to nearest, each by itself: no stage has had a hand in it."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.layout import EMBEDDINGS
from colqwen3.checkpoint.packing import pack, pack_table, round_to_nearest
from stages.quantization.allocation import Allocation
from stages.quantization.checkpoint import write_configs
from stages.quantization.recipes import RtnRecipe

RTN = RtnRecipe(method="rtn", calibration="none", bits=4, group_size=32, sym=True)


def rounded(source: Path, folder: Path, *linears: str, recipe: RtnRecipe = RTN) -> Path:
    """Write a checkpoint with these linears rounded by a recipe, each by itself."""
    return allocated(
        source, folder, Allocation(dict.fromkeys(linears, int(recipe.bits or 0))), recipe
    )


def allocated(source: Path, folder: Path, allocation: Allocation, recipe: RtnRecipe = RTN) -> Path:
    """Write a checkpoint with every module of an allocation rounded to its bits."""
    tensors = {}
    for shard in source.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            module = name.removesuffix(".weight")
            bits = allocation.modules.get(module)
            if bits is None:
                tensors[name] = tensor
                continue
            codes, scales = round_to_nearest(tensor, bits, recipe.group_size)
            packed = (pack_table if module == EMBEDDINGS else pack)(codes, scales, bits)
            tensors |= {f"{module}.{part}": value for part, value in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_configs(source, folder, recipe, allocation)
    return folder
