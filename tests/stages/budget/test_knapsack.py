"""Budgets against brute force over every choice."""

import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from colqwen3.checkpoint.headers import Checkpoint
from colqwen3.checkpoint.layout import EMBEDDINGS
from colqwen3.system.errors import UserError
from stages.budget.knapsack import allocate, items_of, solve
from stages.quantization.allocation import Allocation, bytes_of, planned_tensors
from stages.quantization.recipes import AutoRoundRecipe

DEMO = Path("demo/model")
CONFIG: dict[str, Any] = json.loads((DEMO / "config.json").read_text())
SOURCE = Checkpoint.read(DEMO)
BASE: dict[str, Any] = {
    "method": "autoround", "calibration": "any", "group_size": 128, "sym": True, "iters": 200,
    "seed": 1,
}  # fmt: skip


def recipe(**changes: Any) -> AutoRoundRecipe:
    return AutoRoundRecipe.model_validate({**BASE, **changes})


def sensitivity(seed: int = 0) -> dict[str, Any]:
    """Return losses that fall with bits, each part's by a factor of its own."""
    draw = random.Random(seed)
    items = {}
    for item in items_of(CONFIG):
        pages, queries = draw.uniform(1, 20), draw.uniform(1, 20)
        items[item] = {
            "loss": {
                str(bits): {"pages": pages * 4.0**-bits, "queries": queries * 4.0**-bits}
                for bits in (2, 3, 4, 8)
            }
        }
    return {"items": items}


def allocated(source: Mapping[str, Any] | None = None, **changes: Any) -> Allocation:
    return allocate("r", recipe(**changes), CONFIG, SOURCE.tensors, source or sensitivity())


def bytes_taken(allocation: Allocation) -> int:
    return bytes_of(planned_tensors(SOURCE.tensors, allocation, 128).values())


def test_the_solver_finds_what_brute_force_finds() -> None:
    draw = random.Random(7)
    for _ in range(300):
        sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, 5))]
        costs = [[draw.randint(1, 12) for _ in range(size)] for size in sizes]
        losses = [[draw.choice([0.0, 0.5, 1.0, draw.random()]) for _ in range(n)] for n in sizes]
        capacity = draw.randint(1, 40)
        fitting = [
            sum(loss[place] for loss, place in zip(losses, places, strict=True))
            for places in itertools.product(*map(range, sizes))
            if sum(cost[place] for cost, place in zip(costs, places, strict=True)) <= capacity
        ]
        if not fitting:
            with pytest.raises(ValueError, match="cheapest"):
                solve(costs, losses, capacity)
            continue
        chosen = solve(costs, losses, capacity)
        assert sum(c[p] for c, p in zip(costs, chosen, strict=True)) <= capacity
        total = sum(loss[p] for loss, p in zip(losses, chosen, strict=True))
        assert total == pytest.approx(min(fitting), abs=1e-12)


def test_an_average_is_kept_and_no_other_choice_of_one_layer_is_better() -> None:
    measured = sensitivity(3)
    bits = allocated(measured, bits=3.3)
    parameters = {f"{name}.weight": 0 for name in bits.linears}
    for name in parameters:
        rows, columns = SOURCE.tensors[name].shape
        parameters[name] = rows * columns
    spent = sum(parameters[f"{name}.weight"] * width for name, width in bits.linears.items())
    assert spent <= 3.3 * sum(parameters.values())

    # the choice for one layer, all else as chosen: the best of its 256 within what it was given
    items = [item for item in items_of(CONFIG) if item.startswith("layers.1.")]
    kinds = ("pages", "queries")
    text = [item for item in items_of(CONFIG) if item.startswith("layers.")]
    whole = {k: sum(measured["items"][i]["loss"]["4"][k] for i in text) for k in kinds}

    def price(item: str, width: int) -> int:
        return width * sum(parameters[f"{name}.weight"] for name in items_of(CONFIG)[item])

    def harm(item: str, width: int) -> float:
        loss = measured["items"][item]["loss"][str(width)]
        return float(sum(loss[kind] / whole[kind] for kind in kinds))

    chosen = [bits.linears[items_of(CONFIG)[item][0]] for item in items]
    given = sum(map(price, items, chosen))
    best = min(
        sum(map(harm, items, widths))
        for widths in itertools.product((2, 3, 4, 8), repeat=len(items))
        if sum(map(price, items, widths)) <= given
    )
    assert sum(map(harm, items, chosen)) == pytest.approx(best)


def test_linears_that_kernels_merge_get_one_width() -> None:
    bits = allocated(bits=2.7).linears
    assert len(set(bits.values())) > 1
    for layer in range(CONFIG["text_config"]["num_hidden_layers"]):
        at = f"vlm.model.language_model.layers.{layer}"
        assert len({bits[f"{at}.self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert bits[f"{at}.mlp.gate_proj"] == bits[f"{at}.mlp.up_proj"]


def test_a_budget_of_bytes_chooses_what_the_recipe_does_not_name() -> None:
    whole = sum(tensor.nbytes for tensor in SOURCE.tensors.values())
    for budget in (0.45 * whole, 0.6 * whole, 0.8 * whole):
        assert bytes_taken(allocated(bytes=budget)) <= budget
    free = allocated(bytes=0.45 * whole)
    assert free.vision and free.token_embeddings < 16
    pinned = allocated(bytes=0.8 * whole, token_embeddings=16, vision=16)
    assert not pinned.vision and pinned.token_embeddings == 16
    assert EMBEDDINGS not in pinned.modules


def test_widths_limit_the_choice() -> None:
    assert set(allocated(bits=5.5, widths=[4, 8]).linears.values()) == {4, 8}


def test_more_bytes_never_lose_more() -> None:
    measured, whole = sensitivity(5), sum(t.nbytes for t in SOURCE.tensors.values())

    def harm(allocation: Allocation) -> float:
        total = 0.0
        for item, names in items_of(CONFIG).items():
            width = allocation.modules.get(names[0], 16)
            if width < 16:
                total += sum(measured["items"][item]["loss"][str(width)].values())
        return total

    harms = [harm(allocated(measured, bytes=share * whole)) for share in (0.4, 0.5, 0.65, 0.9)]
    assert harms == sorted(harms, reverse=True)


def test_what_a_budget_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match=r"recipes\.r: its budget is 1,000 bytes.*raise the budget"):
        allocated(bytes=1000)
    with pytest.raises(UserError, match=r"sensitivity of layers\.0\.down was not measured"):
        allocate("r", recipe(bits=3.5), CONFIG, SOURCE.tensors, {"items": {}})
    wide = {**BASE, "group_size": 128, "bits": 3.5}
    config = json.loads(json.dumps(CONFIG))
    config["text_config"]["intermediate_size"] = 480
    with pytest.raises(UserError, match=r"does not divide the 480 inputs"):
        allocate("r", AutoRoundRecipe(**wide), config, SOURCE.tensors, sensitivity())
