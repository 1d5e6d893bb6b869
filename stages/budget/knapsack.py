"""Bits of each weight under a budget of bytes or of bits, by what quantizing each alone costs.

One width is chosen for each item, so that the sum of losses is least and the sum of costs within
the budget: a multiple-choice knapsack. The losses are those of `stages.budget.sensitivity`,
taken as additive. Linears that serving kernels merge (query, key and value; gate and up) are one
item and get one width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colqwen3.checkpoint.headers import TensorInfo
from colqwen3.checkpoint.layout import (
    BLOCKS,
    EMBEDDINGS,
    EMBEDDINGS_BITS,
    VISION_PARTS,
    linears,
    quantizable,
    vision_linears,
    vision_part,
)
from colqwen3.system.errors import UserError
from stages.quantization.allocation import SIXTEEN, Allocation, bytes_of, planned_tensors
from stages.quantization.recipes import AnyRecipe, check_group_size

MERGED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears of a decoder layer that get one width, since kernels run them as one."""
HEADER_BYTES = 160
"""More than the header of a safetensors file says of one tensor."""


def items_of(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return what gets a width of its own: name of the item -> names of its modules.

    ``layers.<number>.<qkv, o, gate_up or down>``, ``vision_<part>`` and ``token_embeddings``.
    """
    layers = dict.fromkeys(
        name.removeprefix(f"{BLOCKS}.").partition(".")[0] for name in linears(config)
    )
    items = {
        f"layers.{layer}.{item}": tuple(f"{BLOCKS}.{layer}.{name}" for name in names)
        for layer in layers
        for item, names in MERGED.items()
    }
    for part in VISION_PARTS:
        items[f"vision_{part}"] = tuple(
            name for name in vision_linears(config) if vision_part(name) == part
        )
    items["token_embeddings"] = (EMBEDDINGS,)
    return items


def solve(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int
) -> list[int]:
    """Return the choice for each item with the least sum of losses whose costs fit, exactly.

    All sums that no other sum beats in both cost and loss are kept, item by item (Nemhauser and
    Ullmann, 1969); the cheaper one is taken where losses are equal.

    Parameters
    ----------
    costs, losses
        Of each choice of each item.
    capacity
        The most that the costs may add up to.

    Raises
    ------
    ValueError
        If not even the cheapest choices fit.
    """
    cost: NDArray[np.int64] = np.zeros(1, np.int64)
    loss: NDArray[np.float64] = np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for prices, harms in zip(costs, losses, strict=True):
        count = len(prices)
        all_costs = (cost[:, None] + np.asarray(prices, np.int64)).ravel()
        all_losses = (loss[:, None] + np.asarray(harms, np.float64)).ravel()
        order = np.lexsort((all_losses, all_costs))
        order = order[all_costs[order] <= capacity]
        if not len(order):
            raise ValueError("not even the cheapest choices fit")
        best = np.minimum.accumulate(all_losses[order])
        kept = order[np.concatenate([[True], best[1:] < best[:-1]])]
        steps.append((kept // count, kept % count))
        cost, loss = all_costs[kept], all_losses[kept]
    state, choices = int(np.argmin(loss)), []
    for origins, chosen in reversed(steps):
        choices.append(int(chosen[state]))
        state = int(origins[state])
    return choices[::-1]


def fits(modules: Sequence[str], config: Mapping[str, Any], group_size: int) -> bool:
    """Whether a group size divides the inputs of all these modules."""
    shapes = quantizable(config)
    return all(shapes[module][1] % group_size == 0 for module in modules)


def choices_of(item: str, recipe: AnyRecipe) -> tuple[int, ...]:
    """Return the widths that an item may have: what the recipe names, else all that there are."""
    if item.startswith("layers."):
        return tuple(recipe.widths)
    table = item == "token_embeddings"
    part = item.removeprefix("vision_")
    named = recipe.token_embeddings if table else getattr(recipe.vision, part)
    if named is not None:
        return (named,)
    if recipe.bytes is None:  # an average of bits is one of the language model
        return (SIXTEEN,)
    return (SIXTEEN, *EMBEDDINGS_BITS) if table else (SIXTEEN, 8)


def normalised(
    measured: Mapping[str, Any], items: Mapping[str, Sequence[str]]
) -> dict[str, dict[int, float]]:
    """Return the loss of each item at each width: that of pages and that of queries, equally weighted.

    Each is divided by what the language model loses of it at 4 bits, so that neither drowns the
    other. 16 bits lose nothing.
    """
    kinds = ("pages", "queries")
    whole = {
        kind: sum(measured[item]["loss"]["4"][kind] for item in items if item.startswith("layers."))
        for kind in kinds
    }
    losses = {item: measured[item]["loss"] if item in measured else {} for item in items}
    return {
        item: {SIXTEEN: 0.0}
        | {
            int(bits): sum(max(0.0, loss[kind]) / max(whole[kind], 1e-12) for kind in kinds)
            for bits, loss in by_bits.items()
        }
        for item, by_bits in losses.items()
    }


def allocate(
    name: str,
    recipe: AnyRecipe,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    sensitivity: Mapping[str, Any],
) -> Allocation:
    """Return the allocation of a recipe with a budget.

    Parameters
    ----------
    name, recipe
        Of params.yaml.
    config, tensors
        Of the source: config.json, and the tensors by published name.
    sensitivity
        artifacts/sensitivity.json.

    Raises
    ------
    UserError
        If the group size does not fit, the sensitivity was not measured, or the budget is below
        what the smallest widths take.
    """
    items = items_of(config)
    check_fit(name, recipe, config)
    measured = sensitivity.get("items", {})
    whole = {item for item, names in items.items() if fits(names, config, recipe.group_size)}
    if missing := whole - measured.keys():
        raise UserError(
            f"params.yaml: recipes.{name} has a budget, for which the sensitivity of {min(missing)} "
            "was not measured; set sensitivity.calibration to a set of calibration.sets"
        )
    losses = normalised(measured, items)
    # what the group size does not divide stays 16-bit; `check_fit` has seen that no recipe names it
    choices = {item: choices_of(item, recipe) if item in measured else (SIXTEEN,) for item in items}

    def price(item: str, bits: int) -> int:
        own = {f"{module}.weight": tensors[f"{module}.weight"] for module in items[item]}
        if recipe.bytes is None:  # whole numbers of bits
            inside = item.startswith("layers.")
            return bits * sum(math.prod(tensor.shape) for tensor in own.values()) if inside else 0
        return bytes_of(planned_tensors(own, _only(items[item], bits), recipe.group_size).values())

    costs = {item: [price(item, bits) for bits in options] for item, options in choices.items()}
    if recipe.bytes is None:
        assert recipe.bits is not None
        parameters = sum(math.prod(shape) for shape in linears(config).values())
        capacity, rest, unit = int(recipe.bits * parameters), 0, "bits"
    else:
        inside = {f"{module}.weight" for modules in items.values() for module in modules}
        others = {key: tensor for key, tensor in tensors.items() if key not in inside}
        headers = HEADER_BYTES * (len(others) + 3 * len(inside))
        capacity, unit = int(recipe.bytes), "bytes"
        rest = sum(tensor.nbytes for tensor in others.values()) + headers
    harms = [[losses[item][bits] for bits in options] for item, options in choices.items()]
    try:
        picked = solve(list(costs.values()), harms, capacity - rest)
    except ValueError:
        least = rest + sum(min(prices) for prices in costs.values())
        raise UserError(
            f"params.yaml: recipes.{name}: its budget is {capacity:,} {unit}, the smallest checkpoint "
            f"that it allows takes {least:,}; raise the budget or allow fewer bits"
        ) from None
    chosen = {item: choices[item][place] for item, place in zip(items, picked, strict=True)}
    bits = {module: chosen[item] for item, modules in items.items() for module in modules}
    table = bits.pop(EMBEDDINGS)
    return Allocation({module: width for module, width in bits.items() if width < SIXTEEN}, table)


def _only(modules: Sequence[str], bits: int) -> Allocation:
    """Return the allocation of these modules alone."""
    if bits == SIXTEEN:
        return Allocation({})
    if EMBEDDINGS in modules:
        return Allocation({}, bits)
    return Allocation(dict.fromkeys(modules, bits))


def check_fit(name: str, recipe: AnyRecipe, config: Mapping[str, Any]) -> None:
    """Check that a recipe's group size fits all that its budget may quantize.

    Raises
    ------
    UserError
        Naming the first module whose inputs it does not divide.
    """
    shapes = quantizable(config)
    for item, modules in items_of(config).items():
        choices = choices_of(item, recipe)
        # beside the decoder layers, what has a choice may stay 16-bit
        if min(choices) < SIXTEEN and (len(choices) == 1 or item.startswith("layers.")):
            check_group_size(name, recipe, {module: shapes[module] for module in modules})
