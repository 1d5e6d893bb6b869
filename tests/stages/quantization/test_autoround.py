"""One layer handed to AutoRound: what it is given, and that nothing is lost on the way."""

from typing import Any

import pytest
import torch
from torch import nn

from colqwen3.system.errors import UserError
from stages.quantization.autoround import capture_inputs, tune_block
from stages.quantization.recipes import AutoRoundRecipe

CPU = torch.device("cpu")
RECIPE = AutoRoundRecipe(
    method="autoround", calibration="any", bits=4, group_size=32, sym=True, iters=3, seed=1
)


class Layer(nn.Module):
    """A residual layer whose output depends on what else it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: torch.Tensor,
    ) -> torch.Tensor:
        assert position_embeddings is not None
        cos, sin = position_embeddings
        moved: torch.Tensor = self.linear(hidden_states * cos) + sin + kwargs["extra"]
        return hidden_states + moved


class Model(nn.Module):
    """Gives its layer inputs that differ from sample to sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.device = CPU

    def forward(self, values: torch.Tensor) -> Any:
        if values.isnan().any():
            raise ValueError("a broken sample\nwith details")
        if (values == 7).all():
            return values
        return self.layer(
            values, attention_mask=None, position_embeddings=(values.cos(), values.sin()),
            extra=values * 2, use_cache=False,
        )  # fmt: skip


def samples(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"values": torch.randn(1, 4 + i, 64, generator=generator)} for i in range(count)]


def test_captured_inputs_are_those_of_each_sample() -> None:
    model, used = Model(), samples()
    found = capture_inputs(model, model.layer, used)
    assert len(found) == 3
    for item, sample in zip(found, used, strict=True):
        values = sample["values"]
        wanted = {
            "hidden_states": values, "position_embeddings.0": values.cos(),
            "position_embeddings.1": values.sin(), "extra": values * 2,
        }  # fmt: skip
        assert item.keys() == wanted.keys()
        assert all(torch.equal(item[key], wanted[key]) for key in wanted)
    assert model(used[0]["values"]).shape == (1, 4, 64)  # the hook is gone


def test_a_sample_that_fails_or_stays_away_is_named() -> None:
    model, (one, two, _) = Model(), samples()
    broken = {"values": torch.full((1, 4, 64), torch.nan)}
    with pytest.raises(UserError, match=r"sample 1 fails in the model \(a broken sample\)"):
        capture_inputs(model, model.layer, [one, broken, two])
    away = {"values": torch.full((1, 4, 64), 7.0)}
    with pytest.raises(UserError, match="3 samples asked for, 2 reached"):
        capture_inputs(model, model.layer, [one, away, two])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("iters", [0, 3])
def test_outputs_are_the_layers_own_before_and_after(count: int, iters: int) -> None:
    model, used = Model(), samples(count)
    inputs = capture_inputs(model, model.layer, used)
    hidden = [item["hidden_states"] for item in inputs]
    shifted = [state + 0.01 for state in hidden]

    def run(states: list[torch.Tensor]) -> list[torch.Tensor]:
        made = []
        for state, item in zip(states, inputs, strict=True):
            cos, sin = item["position_embeddings.0"], item["position_embeddings.1"]
            with torch.no_grad():
                made.append(model.layer(state, position_embeddings=(cos, sin), extra=item["extra"]))
        return made

    wanted = run(hidden)
    recipe = RECIPE.model_copy(update={"iters": iters})
    before, after = tune_block(model.layer, inputs, list(hidden), list(shifted), recipe, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, wanted, strict=True))
    quantized = run(shifted)  # the layer is changed now
    if iters:
        assert after is not None
        assert all(torch.equal(a, b) for a, b in zip(after, quantized, strict=True))
    else:
        assert after is None
    assert not torch.equal(wanted[0], run(hidden)[0])
    scale: Any = model.layer.linear.scale
    steps = model.layer.linear.weight.view(64, 2, 32) / scale.float().unsqueeze(-1)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)


def test_equal_seeds_give_equal_weights() -> None:
    made: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        model, used = Model(), samples(12)
        inputs = capture_inputs(model, model.layer, used)
        hidden = [item["hidden_states"] for item in inputs]
        recipe = RECIPE.model_copy(update={"seed": seed, "iters": 20, "lr": 0.01})
        torch.manual_seed(len(made))  # what ran before must not matter
        tune_block(model.layer, inputs, hidden, None, recipe, CPU)
        made.append(model.layer.linear.weight.detach().clone())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
