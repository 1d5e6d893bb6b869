"""A checkpoint of linears rounded to nearest, each by itself: no stage has had a hand in it."""

from pathlib import Path

from safetensors.torch import load_file, save_file

from colqwen3.checkpoint.packing import pack, round_to_nearest
from stages.quantization.checkpoint import write_configs
from stages.quantization.recipes import RtnRecipe

RTN = RtnRecipe(method="rtn", calibration="none", bits=4, group_size=32, sym=True)


def rounded(source: Path, folder: Path, *linears: str, recipe: RtnRecipe = RTN) -> Path:
    """Write a checkpoint with these linears rounded by a recipe, each by itself."""
    tensors = {}
    for shard in source.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            module = name.removesuffix(".weight")
            if module not in linears:
                tensors[name] = tensor
                continue
            codes, scales = round_to_nearest(tensor, recipe.bits, recipe.group_size)
            packed = pack(codes, scales, recipe.bits)
            tensors |= {f"{module}.{part}": value for part, value in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_configs(source, folder, recipe)
    return folder
