"""The decoder against transformers' text model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from colqwen3.model import ColQwen3, ColQwen3Config
from colqwen3.model.loading import load_model
from colqwen3.serving.decoder import Decoder, DecoderLayer
from colqwen3.serving.fused import PLAIN
from colqwen3.serving.linears import Gated
from colqwen3.serving.weights import Weights, build_decoder
from colqwen3.system.files import read_json

GOLDEN, CPU, F32 = Path("tests/golden/model"), torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def model() -> ColQwen3:
    return load_model(GOLDEN, F32, CPU)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = ColQwen3Config.from_dict(read_json(GOLDEN / "config.json", ""))
    return build_decoder(Weights(GOLDEN, CPU, F32, {}), config)


def run(
    decoder: Decoder, model: ColQwen3, hidden: torch.Tensor, deepstack: object = None
) -> torch.Tensor:
    batch, tokens, _ = hidden.shape
    positions = torch.arange(tokens).expand(3, 1, -1)
    cos, sin = model.vlm.model.language_model.rotary_emb(hidden, positions)
    cos, sin = cos[0].repeat(batch, 1), sin[0].repeat(batch, 1)
    with torch.inference_mode():
        return decoder.run(hidden, cos, sin, PLAIN, deepstack)  # type: ignore[arg-type]


@torch.inference_mode()
def reference(model: ColQwen3, hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
    last = model.vlm.model.language_model(inputs_embeds=hidden, use_cache=False, **kwargs)[0]
    return torch.nn.functional.normalize(model.embedding_proj_layer(last), dim=-1)


def states(batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, tokens, 128, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(("batch", "tokens"), [(1, 7), (3, 70)])
def test_vectors_equal_transformers(
    decoder: Decoder, model: ColQwen3, batch: int, tokens: int
) -> None:
    hidden = states(batch, tokens)
    torch.testing.assert_close(
        run(decoder, model, hidden), reference(model, hidden), atol=1e-5, rtol=0
    )


def test_padding_on_the_right_changes_nothing(decoder: Decoder, model: ColQwen3) -> None:
    hidden = states(2, 9)
    padded = torch.cat([hidden, 100 * torch.ones(2, 3, 128)], 1)
    actual = run(decoder, model, padded)[:, :9]
    torch.testing.assert_close(actual, run(decoder, model, hidden), atol=1e-5, rtol=0)


def test_deepstack_is_added_behind_its_layer(decoder: Decoder, model: ColQwen3) -> None:
    hidden, visual = states(2, 6), torch.tensor([1, 2, 8])
    features = [torch.randn(3, 128) for _ in range(3)]
    mask = torch.zeros(12, dtype=torch.bool)
    mask[visual] = True
    expected = reference(
        model, hidden, visual_pos_masks=mask.view(2, 6), deepstack_visual_embeds=features
    )
    actual = run(decoder, model, hidden, (visual, features))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(actual, run(decoder, model, hidden), atol=1e-2)


def test_a_gate_within_a_product_is_not_computed_again(decoder: Decoder, model: ColQwen3) -> None:
    def within(layer: DecoderLayer) -> DecoderLayer:
        return replace(layer, gate_up=lambda h: Gated(PLAIN.gate(layer.gate_up(h))))

    hidden = states(2, 9)
    actual = run(replace(decoder, layers=[*map(within, decoder.layers)]), model, hidden)
    assert torch.equal(actual, run(decoder, model, hidden))


def test_the_short_kernel_is_for_short_sequences(decoder: Decoder, model: ColQwen3) -> None:
    lengths = []

    def short(qkv: torch.Tensor, *rest: object) -> torch.Tensor:
        lengths.append(rest[-1])
        return torch.zeros(len(qkv), decoder.heads * decoder.head_dim)

    operations = PLAIN._replace(short_attention=short)
    for tokens in (64, 65):
        cos = sin = torch.ones(tokens, decoder.head_dim)
        with torch.inference_mode():
            decoder.run(states(1, tokens), cos, sin, operations)
    assert set(lengths) == {64}
