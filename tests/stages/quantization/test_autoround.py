"""One layer handed to AutoRound: what it is given, and that nothing is lost on the way."""

from typing import Any

import pytest
import torch
from torch import nn

from stages.quantization.activations import SamplesLostError, capture_inputs, output_error
from stages.quantization.recipes import AutoRoundRecipe
from stages.quantization.tuning import round_layer, tune_layer

CPU = torch.device("cpu")
RECIPE = AutoRoundRecipe(
    method="autoround",
    calibration="any",
    bits=4,
    group_size=32,
    sym=True,
    iters=3,
    lr=0.01,
    seed=1,
)
BITS = {"linear": 4}


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
    """Inputs in few directions, as true activations are: there tuning has something to gain."""
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(3, 64, generator=generator)
    return [
        {"values": torch.randn(1, 4 + i, 3, generator=generator) @ directions} for i in range(count)
    ]


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
    with pytest.raises(SamplesLostError, match=r"sample 1 fails in the model \(a broken sample\)"):
        capture_inputs(model, model.layer, [one, broken, two])
    away = {"values": torch.full((1, 4, 64), 7.0)}
    with pytest.raises(SamplesLostError, match="3 samples asked for, 2 reached"):
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
    before, after, _ = tune_layer(
        model.layer, inputs, list(hidden), list(shifted), recipe, BITS, CPU
    )
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
        tune_layer(model.layer, inputs, hidden, None, recipe, BITS, CPU)
        made.append(model.layer.linear.weight.detach().clone())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def tune(**changes: Any) -> tuple[Layer, Any]:
    model, used = Model(), samples(12)
    inputs = capture_inputs(model, model.layer, used)
    hidden = [item["hidden_states"] for item in inputs]
    recipe = RECIPE.model_copy(update={"iters": 8, "lr": 0.02, **changes})
    bits = {"linear": int(recipe.bits or 0)}
    _, after, outcome = tune_layer(model.layer, inputs, hidden, hidden, recipe, bits, CPU)
    return model.layer, (after, outcome, inputs, hidden)


def weights(layer: Layer) -> torch.Tensor:
    return layer.linear.weight.detach().clone()


def test_every_option_of_a_recipe_changes_the_result() -> None:
    base, _ = tune()
    for change in (
        {"iters": 7},
        {"lr": 0.03},
        {"gradient_accumulate_steps": 2},
        {"bits": 3},
        {"group_size": 64},
    ):
        other, _ = tune(**change)
        assert not torch.equal(weights(base), weights(other)), change


def test_autoround_keeps_the_last_of_as_many_steps_as_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import auto_round

    options: dict[str, Any] = {}
    library = auto_round.AutoRound

    def spy(*args: Any, **kwargs: Any) -> Any:
        options.update(kwargs)
        return library(*args, **kwargs)

    monkeypatch.setattr(auto_round, "AutoRound", spy)
    tune(iters=10, lr=None)
    # AutoRound collects its result before the last step that it makes
    assert (options["iters"], options["lr"], options["not_use_best_mse"]) == (11, 0.1, True)


def test_errors_of_both_ways_are_those_computed_by_hand() -> None:
    layer, (after, outcome, inputs, hidden) = tune()
    original = Model().layer
    rounded = Model().layer
    scales = round_layer(rounded, BITS, 32)
    step = scales["linear"].float().repeat_interleave(32, dim=1)
    assert ((rounded.linear.weight - original.linear.weight).abs() <= step.abs() * 1.001).all()

    def run(one: Layer) -> torch.Tensor:
        parts = []
        for state, item in zip(hidden, inputs, strict=True):
            cos, sin = item["position_embeddings.0"], item["position_embeddings.1"]
            with torch.no_grad():
                parts.append(one(state, position_embeddings=(cos, sin), extra=item["extra"])[0])
        return torch.cat(parts).double()

    target = run(original)
    for error, one in ((outcome.tuned, layer), (outcome.rounded, rounded)):
        assert error == pytest.approx(float((run(one) - target).norm() / target.norm()), rel=1e-5)
    assert outcome.tuning_won == (outcome.tuned <= outcome.rounded)
    torch.testing.assert_close(torch.cat([state[0] for state in after]).double(), run(layer))


def test_a_layer_that_loses_is_rounded_and_so_are_its_outputs() -> None:
    layer, (after, outcome, inputs, hidden) = tune(lr=0.95)
    rounded = Model().layer
    round_layer(rounded, BITS, 32)
    assert not outcome.tuning_won
    assert torch.equal(layer.linear.weight, rounded.linear.weight)
    cos, sin = inputs[3]["position_embeddings.0"], inputs[3]["position_embeddings.1"]
    with torch.no_grad():
        expected = rounded(hidden[3], position_embeddings=(cos, sin), extra=inputs[3]["extra"])
    assert torch.equal(after[3], expected)


def test_error_of_nothing_is_finite() -> None:
    assert output_error([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert output_error([torch.ones(4)], [torch.zeros(4)]) == 2


def test_the_librarys_log_has_no_colours_and_no_remarks(capfd: pytest.CaptureFixture[str]) -> None:
    tune()
    err = capfd.readouterr().err
    assert "\x1b" not in err
    assert "torch.compile" not in err and "Passing '" not in err
