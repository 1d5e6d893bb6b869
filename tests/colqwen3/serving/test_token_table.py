"""Which activations are chosen for how many tokens."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colqwen3.serving import token_table
from colqwen3.serving.fused import PLAIN, int8_operations
from colqwen3.serving.int8 import Int8Tokens, quantize_tokens
from colqwen3.serving.linears import Gated
from colqwen3.serving.load import load_runtime
from colqwen3.serving.runtime import MAXIMUM_INT8_ERROR
from colqwen3.serving.token_table import TokenTable, find_table, linears_apart

SIZES = [128, 256, 512, 1024]
TABLE = TokenTable(SIZES, [100.0, 110.0, 200.0, 300.0], [90.0, 150.0, 150.0, 210.0])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    # never up to 64; else as at the next larger size, and beyond the last as at the last
    [(1, False), (64, False), (65, True), (128, True), (129, False), (256, False), (257, True),
     (1024, True), (9999, True)],
)  # fmt: skip
def test_the_next_larger_size_decides(tokens: int, expected: bool) -> None:
    assert TABLE.int8_is_faster(tokens) == expected


def test_untimed_all_but_single_queries_are_in_8_bits() -> None:
    assert [TokenTable().int8_is_faster(tokens) for tokens in (64, 65, 100_000)] == [
        False, True, True,
    ]  # fmt: skip


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, list[int], Path]:
    """A machine whose card is measured as `TABLE` says, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(token_table, "SIZES", SIZES)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    measured: list[int] = []

    def measure(*_: Any) -> TokenTable:
        measured.append(1)
        return TABLE

    monkeypatch.setattr(token_table, "_measure", measure)
    decoder = SimpleNamespace(norm=SimpleNamespace(device=torch.device("cuda:0")))
    return decoder, measured, tmp_path / "colqwen3-autoround"


def test_it_is_measured_once_for_each_key(on_a_card: tuple[Any, list[int], Path]) -> None:
    decoder, measured, folder = on_a_card
    assert find_table(decoder, PLAIN, PLAIN, "a model", None) == TABLE
    assert find_table(decoder, PLAIN, PLAIN, "a model", None) == TABLE
    assert len(measured) == 1
    find_table(decoder, PLAIN, PLAIN, "another model", None)
    assert len(measured) == len(list(folder.iterdir())) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
        find_table(decoder, PLAIN, PLAIN, "a model", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "2.0")
        find_table(decoder, PLAIN, PLAIN, "a model", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_table, "digest_file", lambda path: "other code")
        find_table(decoder, PLAIN, PLAIN, "a model", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        find_table(decoder, PLAIN, PLAIN, "a model", None)
    assert len(measured) == 6


@pytest.mark.parametrize(
    "damaged",
    ["", "{}", "[1]", json.dumps({"tokens": [1]}),
     json.dumps({"tokens": [], "bfloat16": [], "int8": []}),
     json.dumps({"tokens": SIZES, "bfloat16": [1.0], "int8": [1.0] * 4}),
     json.dumps({"tokens": SIZES, "bfloat16": ["fast"] * 4, "int8": [1.0] * 4})],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(
    on_a_card: tuple[Any, list[int], Path], damaged: str
) -> None:
    decoder, measured, folder = on_a_card
    find_table(decoder, PLAIN, PLAIN, "a model", None)
    (kept,) = folder.iterdir()
    kept.write_text(damaged)
    assert find_table(decoder, PLAIN, PLAIN, "a model", None) == TABLE
    assert len(measured) == 2
    assert json.loads(kept.read_text())["tokens"] == TABLE.tokens


def test_without_a_place_to_keep_it_a_warning_says_so(
    on_a_card: tuple[Any, list[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    decoder, _, folder = on_a_card
    folder.write_text("a file where the folder should be")
    assert find_table(decoder, PLAIN, PLAIN, "a model", None) == TABLE
    assert "measured at each start" in caplog.text


def test_linears_apart_are_seen() -> None:
    runtime = load_runtime(Path("tests/golden/model"), "cpu", torch.float32, activations="int8")
    decoder, operations = runtime._decoder, int8_operations(PLAIN, runtime.device)
    assert 0.001 < linears_apart(decoder, PLAIN, operations) < MAXIMUM_INT8_ERROR
    for broken in (
        lambda x: quantize_tokens(x)._replace(scales=quantize_tokens(x).scales * 1.2),
        lambda x: quantize_tokens(x)._replace(codes=quantize_tokens(x).codes.roll(1, 0)),
        lambda x: quantize_tokens(x * x.new_full((1,), float("nan"))),
    ):
        off = linears_apart(decoder, PLAIN, operations._replace(attended=broken))
        assert not off <= MAXIMUM_INT8_ERROR


def test_a_gate_within_a_product_is_compared_too() -> None:
    runtime = load_runtime(Path("tests/golden/model"), "cpu", torch.float32, activations="int8")
    decoder, operations = runtime._decoder, int8_operations(PLAIN, runtime.device)
    layer, worst = decoder.layers[0], []
    for factor in (None, 1.0, 1.3):

        def gate_up(x: Any, factor: float | None = factor) -> Any:
            made = layer.gate_up(x)
            if factor is None or isinstance(x, Int8Tokens):
                return made
            return Gated(factor * PLAIN.gate(made))

        layers = [replace(layer, gate_up=gate_up), *decoder.layers[1:]]
        worst.append(linears_apart(replace(decoder, layers=layers), PLAIN, operations))
    assert worst[1] < MAXIMUM_INT8_ERROR
    assert worst[1] == pytest.approx(worst[0], rel=0.5)
    assert worst[2] > 0.2
