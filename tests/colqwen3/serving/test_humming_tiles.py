"""Which tiles a 4-bit product is cut into; that they are right and faster was seen on an H100."""

import math
from typing import Any

import pytest

from colqwen3.serving.humming_tiles import Product, choose_tile, replace_tiles, suits

QKV, OUT, GATE_UP, DOWN = (
    Product(inputs, outputs, 132)
    for inputs, outputs in ((2560, 6144), (4096, 2560), (2560, 19456), (9728, 2560))
)


def options(tokens: int) -> dict[str, Any]:
    return {"block_shape": [tokens, 256, 64]}


OWN = [
    [0, 8, options(8)],
    [8, 64, options(64)],
    [64, 4096, options(128)],
    [4096, 1 << 30, options(176)],
]


def test_ranges_follow_each_other_without_a_gap() -> None:
    ranges = replace_tiles(OWN, QKV)
    assert (ranges[0][0], ranges[-1][1]) == (0, 1 << 30)
    assert [left[1] for left in ranges[:-1]] == [right[0] for right in ranges[1:]]
    assert all(start < end for start, end, _ in ranges)
    # humming's own at both ends
    assert [r for r in ranges if r[1] <= 16] == [[0, 8, options(8)], [8, 16, options(64)]]
    assert [r for r in ranges if r[0] >= 2048] == [
        [2048, 4096, options(128)],
        [4096, 1 << 30, options(176)],
    ]


def test_a_range_has_the_tile_of_each_number_of_tokens_in_it() -> None:
    ranges = replace_tiles(OWN, DOWN)
    for tokens in (17, 24, 25, 26, 104, 128, 129, 208, 256, 257, 1291, 2041, 2048):
        (found,) = [o for start, end, o in ranges if start < tokens <= end]
        assert found == choose_tile(DOWN, math.ceil(tokens / 8) * 8)


# tokens, programs on a multiprocessor and so on that were the fastest in turns on an H100, or within
# 3 % of it
@pytest.mark.parametrize(
    ("product", "tokens", "shape", "programs", "split"),
    [
        (GATE_UP, 32, [32, 128, 64], 3, True),
        (DOWN, 32, [32, 128, 128], 1, True),
        (QKV, 32, [32, 128, 64], 2, True),
        (OUT, 32, [32, 128, 64], 1, True),
        (GATE_UP, 104, [104, 128, 64], 2, True),
        (DOWN, 104, [104, 128, 64], 1, True),
        (GATE_UP, 208, [104, 128, 64], 2, True),
        (OUT, 208, [104, 128, 64], 2, True),
        (GATE_UP, 416, [144, 256, 64], 1, False),
        (OUT, 416, [104, 256, 64], 1, True),
        (QKV, 1272, [120, 256, 64], 1, False),
        (GATE_UP, 1272, [184, 256, 64], 1, True),
        (QKV, 1664, [152, 256, 64], 1, False),
        (GATE_UP, 1664, [168, 256, 64], 1, False),
        (DOWN, 1664, [128, 256, 64], 1, False),
        (OUT, 1664, [128, 256, 64], 1, False),
    ],
)
def test_tiles_of_the_4b_model(
    product: Product, tokens: int, shape: list[int], programs: int, split: bool
) -> None:
    chosen = choose_tile(product, tokens)
    actual = [chosen[key] for key in ("block_shape", "num_ctas_per_sm", "use_stream_k")]
    assert actual == [shape, programs, split]
    assert chosen["warp_shape"][0] == shape[0]


def test_whole_waves_are_not_split() -> None:
    # 11 x 24 = 264 tiles of 152 tokens are two waves of 132
    assert choose_tile(QKV, 11 * 152)["use_stream_k"] is False
    # with 4 processors fewer they would be three
    fewer = choose_tile(QKV._replace(processors=128), 11 * 152)
    assert fewer["use_stream_k"] or fewer["block_shape"][0] != 152


def test_a_tile_fits_the_memory_of_a_multiprocessor() -> None:
    for product in (QKV, OUT, GATE_UP, DOWN):
        for tokens in range(24, 2049, 8):
            chosen = choose_tile(product, tokens)
            rows, columns, depth = chosen["block_shape"]
            stage = rows * depth * 2 + columns * depth // 2 + columns * 2
            whole = stage * chosen["num_stages"] * chosen["num_ctas_per_sm"]
            assert whole <= 200 * 1024
            assert product.inputs % depth == 0
            assert product.outputs % columns == 0
            # accumulators: one for each token of a tile, of 168 registers or what two programs leave
            assert rows <= {1: 184, 2: 128, 3: 56}[chosen["num_ctas_per_sm"]]


@pytest.mark.parametrize(
    ("capability", "bits", "product", "expected"),
    [
        ((9, 0), 4, QKV, True),
        ((8, 0), 4, QKV, False),
        ((9, 0), 8, QKV, False),
        ((9, 0), 4, QKV._replace(processors=78), False),
        ((9, 0), 4, QKV._replace(outputs=128), False),
        ((9, 0), 4, QKV._replace(inputs=96), False),
    ],
)
def test_other_cards_and_linears_keep_hummings_own(
    capability: tuple[int, int], bits: int, product: Product, expected: bool
) -> None:
    assert suits(capability, bits, product) is expected
