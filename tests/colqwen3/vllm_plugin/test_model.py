"""The plugin of vLLM, on a stand-in for vLLM; `make check-vllm` runs it in the real one."""

import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

HIDDEN, WIDTH = 6, 4
PREFIX = "embedding_proj_layer."
TENSORS = {f"{PREFIX}weight": torch.randn(WIDTH, HIDDEN), f"{PREFIX}bias": torch.randn(WIDTH)}
REGISTERED: dict[str, str] = {}


class TheirColQwen3(nn.Module):
    """vLLM's class as far as the plugin relies on it: a projection without bias, filled by name."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.embed_dim = getattr(vllm_config.model_config.hf_config, "embed_dim", None)
        self.custom_text_proj = nn.Linear(HIDDEN, self.embed_dim or 1, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            last = name.rpartition(".")[2]
            parameter = getattr(self.custom_text_proj, last, None)
            if parameter is not None:
                parameter.data.copy_(tensor)
                loaded.add(f"custom_text_proj.{last}")
        return loaded


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = "vllm", "vllm.model_executor", "vllm.model_executor.models"
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules["vllm"].ModelRegistry = SimpleNamespace(register_model=REGISTERED.__setitem__)
    theirs: Any = ModuleType(f"{names[-1]}.colqwen3")
    theirs.ColQwen3Model = TheirColQwen3
    for name, module in {**modules, theirs.__name__: theirs}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "colqwen3.vllm_plugin.model", raising=False)
    yield
    sys.modules.pop("colqwen3.vllm_plugin.model", None)


def build(**config: Any) -> Any:
    hf_config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=HIDDEN), **config)
    model_config = SimpleNamespace(hf_config=hf_config, head_dtype=torch.float32)
    kind = import_module("colqwen3.vllm_plugin.model").ColQwen3WithBias
    return kind(vllm_config=SimpleNamespace(model_config=model_config))


def test_vllm_finds_the_class_by_the_entry_point() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    (target,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, name = target.partition(":")
    getattr(import_module(module), name)()
    place, _, name = REGISTERED["ColQwen3"].partition(":")
    assert issubclass(getattr(import_module(place), name), TheirColQwen3)


@pytest.mark.parametrize("config", [{"embed_dim": WIDTH}, {"embed_dim": None, "vector_dim": WIDTH}])
@pytest.mark.parametrize("bias", ["bias", "before_weight.bias"])
@pytest.mark.parametrize("turn", [1, -1])
def test_the_bias_is_loaded_from_either_layout_in_any_order(
    config: dict[str, Any], bias: str, turn: int
) -> None:
    model = build(**config)
    named = {
        f"{PREFIX}{bias}": TENSORS[f"{PREFIX}bias"],
        f"{PREFIX}weight": TENSORS[f"{PREFIX}weight"],
    }
    guard = {f"{PREFIX}guard_weight": torch.zeros(1)}
    model.load_weights(list({**named, **guard}.items())[::turn])
    inputs = torch.randn(3, HIDDEN)
    expected = inputs @ TENSORS[f"{PREFIX}weight"].T + TENSORS[f"{PREFIX}bias"]
    torch.testing.assert_close(model.custom_text_proj(inputs), expected)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_an_incomplete_projection_is_rejected(missing: str) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if not name.endswith(missing)}
    with pytest.raises(ValueError, match=rf"lacks the tensor embedding_proj_layer\.{missing}"):
        build(embed_dim=WIDTH).load_weights(tensors.items())


@pytest.mark.parametrize("config", [{}, {"embed_dim": WIDTH, "vector_dim": WIDTH + 1}])
def test_a_width_must_be_given_once(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"config\.json: give the width"):
        build(**config)
