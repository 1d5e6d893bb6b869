"""How many bits each weight of a checkpoint gets, and the tensors and bytes that follow from it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from colqwen3.checkpoint.headers import DTYPE_BYTES, Spec, TensorInfo
from colqwen3.checkpoint.layout import (
    BLOCKS,
    EMBEDDINGS,
    VISION,
    Shape,
    linears,
    quantizable,
    vision_linears,
    vision_part,
)
from colqwen3.checkpoint.quantization import PACKED_TABLE
from colqwen3.system.errors import UserError
from colqwen3.system.files import read_json
from stages.quantization.recipes import AnyRecipe, check_group_size

SIXTEEN = 16
"""Bits of what is not quantized."""


@dataclass(frozen=True)
class Allocation:
    """Bits of the quantized weights of a checkpoint.

    Attributes
    ----------
    linears
        Name of each quantized linear -> its bits; those of the language model come first.
    token_embeddings
        Bits of the token embeddings; 16 if they are not quantized.
    """

    linears: dict[str, int]
    token_embeddings: int = SIXTEEN

    @property
    def text(self) -> list[str]:
        """Names of the quantized linears of all decoder layers."""
        return [name for name in self.linears if name.startswith(f"{BLOCKS}.")]

    @property
    def layers(self) -> list[list[str]]:
        """Names of the quantized linears of each decoder layer."""
        layers: dict[int, list[str]] = {}
        for name in self.text:
            index = name.removeprefix(f"{BLOCKS}.").partition(".")[0]
            layers.setdefault(int(index), []).append(name)
        return [layers[index] for index in sorted(layers)]

    @property
    def vision(self) -> list[str]:
        """Names of the quantized linears of the vision tower."""
        return [name for name in self.linears if name.startswith(f"{VISION}.")]

    @property
    def modules(self) -> dict[str, int]:
        """Bits of every quantized module, the token embeddings among them."""
        table = {EMBEDDINGS: self.token_embeddings} if self.token_embeddings < SIXTEEN else {}
        return {**self.linears, **table}

    @property
    def front(self) -> dict[str, int]:
        """Bits of every quantized module that comes before the decoder layers."""
        inside = set(self.text)
        return {name: bits for name, bits in self.modules.items() if name not in inside}


def uniform(name: str, recipe: AnyRecipe, config: Mapping[str, Any]) -> Allocation:
    """Return the allocation of a recipe that gives all linears of the language model one width.

    Parameters
    ----------
    name, recipe
        Of params.yaml; the recipe names its bits.
    config
        The model's config.json.

    Raises
    ------
    UserError
        If the recipe's group size does not divide the inputs of a linear.
    """
    bits: dict[str, int] = dict.fromkeys(linears(config), int(recipe.bits or 0))
    for linear in vision_linears(config):
        if (width := recipe.vision_bits[vision_part(linear)]) < SIXTEEN:
            bits[linear] = width
    allocation = Allocation(bits, recipe.token_embeddings or SIXTEEN)
    check_group_size(name, recipe, shapes_of(allocation, config))
    return allocation


def shapes_of(allocation: Allocation, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shape [outputs, inputs] of each quantized module."""
    shapes = quantizable(config)
    return {name: shapes[name] for name in allocation.modules}


def planned_tensors(
    tensors: Mapping[str, TensorInfo], allocation: Allocation, group_size: int
) -> dict[str, Spec]:
    """Return dtype and shape of every tensor of the checkpoint to make.

    Parameters
    ----------
    tensors
        Those of the source by published name.
    allocation
        Which weights are quantized.
    group_size
        Weights of a row that share one scale.
    """
    specs: dict[str, Spec] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        bits = allocation.modules.get(module)
        if bits is None:
            specs[name] = (tensor.dtype, tensor.shape)
            continue
        rows, width = tensor.shape
        groups, words = width // group_size, width * bits // 32
        if module == EMBEDDINGS:
            packed, scale = PACKED_TABLE
            specs[f"{module}.{packed}"] = ("I32", (rows, words))
            specs[f"{module}.{scale}"] = ("F16", (rows, groups))
            continue
        specs[f"{module}.qweight"] = ("I32", (words, rows))
        specs[f"{module}.qzeros"] = ("I32", (groups, rows * bits // 32))
        specs[f"{module}.scales"] = ("F16", (groups, rows))
    return specs


def bytes_of(specs: Iterable[Spec]) -> int:
    """Return the bytes of tensors."""
    return sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in specs)


def describe(allocation: Allocation, specs: Mapping[str, Spec]) -> dict[str, Any]:
    """Return an allocation as a JSON value, with the bytes of the tensors that it leads to."""
    return {**asdict(allocation), "bytes": bytes_of(specs.values())}


def read_allocation(path: Path) -> Allocation:
    """Read what `describe` gave.

    Raises
    ------
    UserError
        If the file is missing or damaged.
    """
    fix = "run `dvc repro -f allocate`"
    content = read_json(path, fix)
    try:
        return Allocation(dict(content["linears"]), int(content["token_embeddings"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: is damaged; {fix}") from None


def describe_bits(allocation: Allocation) -> dict[str, dict[str, int]]:
    """Return how many linears of each part have how many bits: part -> bits -> linears."""
    counts: dict[str, Counter[str]] = {}
    parts = dict.fromkeys(allocation.text, "language_model")
    parts |= {name: f"vision_{vision_part(name)}" for name in allocation.vision}
    for name, part in parts.items():
        counts.setdefault(part, Counter())[str(allocation.linears[name])] += 1
    return {part: dict(sorted(count.items())) for part, count in sorted(counts.items())}
