"""Tiles of humming's 4-bit products on an H100, where others than its own are faster.

A product of [tokens, inputs] and [inputs, outputs] is cut into tiles of tokens x outputs, a wave of
them at a time. humming takes the fewest tiles along the tokens, and splits those of the last wave
along the inputs where they would leave multiprocessors idle ("stream-K"). Each choice here was timed
against humming's own on the shapes of the 4B model, see docs/benchmarks.md. Where none may be split,
they are the same up to 256 tokens, and beyond the best by the same estimate. So are those of a product
with a gate at its end, see `humming_gate`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

Options = dict[str, Any]

CAPABILITY, PROCESSORS = (9, 0), 132
"""Of the card that was timed: an H100 (an H200 has as many multiprocessors)."""
MINIMUM_WIDTH = 2048
"""Inputs and outputs of the smallest linear they are used for; those timed had 2,560 and more."""
NARROW, WIDE, DEPTH = 128, 256, 64
"""Outputs of a tile, and inputs of a step."""
OWN_UP_TO = 16
"""Tokens up to which humming's own tiles are taken: others were not faster."""
ESTIMATED_UP_TO = 8192
"""Tokens beyond which tiles are `LARGEST`, or those that may not be split humming's own, and where a
gate is part of a product the same as for so many."""
WAVES_FROM = 256
"""Tokens beyond which tiles are chosen by what `_cost` estimates; with a gate they are whole."""
SPLIT_SHARE = 3
"""One of so many tiles may be split where a gate is part of a product: of split ones it costs more."""
WHOLE_TILE_TOKENS = tuple(range(88, 185, 8))
"""Tokens of a wide tile that may not be split, with a gate or for more than `LARGE_FROM` tokens."""
WIDE_TILE_TOKENS: tuple[int, ...] = (88, 104, 120, 128, 144, 152, 168, 184)
"""Tokens of a wide tile up to `LARGE_FROM` tokens, to choose from."""
LARGE_FROM, LARGE_TILE_TOKENS = 2048, (160, 176, 192)
"""Tokens beyond which wide tiles are larger, and their tokens."""
LARGEST = LARGE_TILE_TOKENS[-1]
SPLIT_COST, TILE_COST = 16, 48
"""Of `_cost`: what agreed best with the times of products of 416 to 1,664 tokens, issued later."""
FEW_TOKENS = 56
"""Tokens of a tile up to which a third program fits on a multiprocessor, or a step twice as deep."""
LONG = 16
"""Steps for each multiprocessor from which a product is long."""


class Product(NamedTuple):
    """A linear on a card with so many multiprocessors.

    Tiles that may not be split give the same bits in every run: in which order the parts of a split
    one are added up depends on which ends first.
    """

    inputs: int
    outputs: int
    processors: int
    may_split: bool = True


class Range(NamedTuple):
    """humming's options for more tokens than `beyond`, at most `up_to`."""

    beyond: int
    up_to: int
    options: Options


def has_tiles(capability: tuple[int, int], bits: int, product: Product) -> bool:
    """Whether there are tiles for such a card and linear."""
    known = capability == CAPABILITY and product.processors == PROCESSORS
    fits = product.outputs % WIDE == 0 and product.inputs % DEPTH == 0
    return known and bits == 4 and fits and min(product.inputs, product.outputs) >= MINIMUM_WIDTH


def replace_tiles(own: list[Range], product: Product) -> list[Range]:
    """Return humming's own ranges of tokens with the tiles of this module between them."""
    ranges = _merge(product, OWN_UP_TO, ESTIMATED_UP_TO, choose_tile)
    small = [r._replace(up_to=min(r.up_to, OWN_UP_TO)) for r in own if r.beyond < OWN_UP_TO]
    if product.may_split:
        large = [Range(ESTIMATED_UP_TO, own[-1].up_to, _tile(LARGEST, WIDE))]
    else:
        large = [
            r._replace(beyond=max(r.beyond, ESTIMATED_UP_TO))
            for r in own
            if r.up_to > ESTIMATED_UP_TO
        ]
    return [*small, *ranges, *large]


@functools.cache
def gate_beyond(product: Product) -> int:
    """Return the tokens beyond which a gate is part of a product, `LARGEST` or more.

    For fewer tokens it was slower; tiles that may not be split were not timed.
    """
    for tokens in range(WAVES_FROM, LARGEST, -8):
        options = choose_tile(product, tokens)
        if split_tiles(product, tokens, options) * SPLIT_SHARE > _tiles(product, tokens, options):
            return tokens
    return LARGEST


def _tiles(product: Product, tokens: int, options: Options) -> int:
    rows, columns, _ = map(int, options["block_shape"])
    return -(-tokens // rows) * (product.outputs // columns)


def split_tiles(product: Product, tokens: int, options: Options) -> int:
    """Return how many tiles humming takes for those that are split, or could be.

    That is the last wave, and the one before it where the last has few.
    """
    if not options["use_stream_k"]:
        return 0
    tiles = _tiles(product, tokens, options)
    programs = product.processors * int(options["num_ctas_per_sm"])
    if tiles <= programs:
        return tiles
    last = tiles % programs
    return last + programs if 0 < 10 * last <= programs else last


def gated_ranges(product: Product, last: int) -> list[Range]:
    """Return the tiles of a product with a gate, for up to `last` tokens.

    They are for more than `gate_beyond`, but humming asks for one token's too.
    """
    ranges = list(_merge(product, gate_beyond(product), ESTIMATED_UP_TO, choose_gated_tile))
    ranges[0] = ranges[0]._replace(beyond=0)
    ranges[-1] = ranges[-1]._replace(up_to=last)
    return ranges


@functools.cache
def _merge(
    product: Product, beyond: int, up_to: int, choose: Callable[[Product, int], Options]
) -> tuple[Range, ...]:
    """Return the ranges of tokens that have the same options."""
    ranges: list[Range] = []
    for tokens in range(beyond + 8, up_to + 1, 8):
        options = choose(product, tokens)
        if ranges and ranges[-1].options == options:
            ranges[-1] = ranges[-1]._replace(up_to=tokens)
        else:
            ranges.append(Range(tokens - 8, tokens, options))
    return tuple(ranges)


def split_sums(product: Product) -> tuple[int, int]:
    """Return how many tiles of a product with a gate are split at most, and the sums of a tile."""
    tiles, sums = 0, 0
    for tokens in range(gate_beyond(product) + 8, WAVES_FROM + 1, 8):
        options = choose_gated_tile(product, tokens)
        tiles = max(tiles, split_tiles(product, tokens, options))
        sums = max(sums, math.prod(options["block_shape"][:2]))
    return tiles, sums


def trial_tokens(product: Product, gate: bool) -> list[int]:
    """Return numbers of tokens, one for each tile, that leave its last one along the tokens ragged.

    With a `gate` these are the tiles of a product that has it at its end.
    """
    tokens: dict[tuple[str, bool], int] = {}
    last = gate_beyond(product) if gate else ESTIMATED_UP_TO
    ranges = [*_merge(product, OWN_UP_TO, last, choose_tile)]
    if gate:
        ranges += _merge(product, last, ESTIMATED_UP_TO, choose_gated_tile)
    elif product.may_split:
        ranges += [Range(ESTIMATED_UP_TO, ESTIMATED_UP_TO + 8, _tile(LARGEST, WIDE))]
    for beyond, up_to, options in ranges:
        tokens.setdefault((str(options), gate and beyond >= last), max(beyond + 1, up_to - 3))
    return list(tokens.values())


def choose_tile(product: Product, tokens: int) -> Options:
    """Return the options of a product of more than 16 tokens."""
    if tokens > WAVES_FROM:
        splits, sizes = (False, True) if product.may_split else (False,), WIDE_TILE_TOKENS
        if tokens > LARGE_FROM:
            sizes = LARGE_TILE_TOKENS if product.may_split else WHOLE_TILE_TOKENS
        pairs = [(each, split) for each in sizes for split in splits]
        each, split = min(pairs, key=lambda pair: _cost(product, tokens, *pair))
        return _tile(each, WIDE, split=split)
    return _choose_narrow_tile(product, tokens) | {"use_stream_k": product.may_split}


def choose_gated_tile(product: Product, tokens: int) -> Options:
    """Return the options of a product with a gate, of more than `gate_beyond` tokens."""
    if tokens <= WAVES_FROM:
        return choose_tile(product, tokens)
    each = min(WHOLE_TILE_TOKENS, key=lambda each: _cost(product, tokens, each, split=False))
    return _tile(each, WIDE, split=False)


def _choose_narrow_tile(product: Product, tokens: int) -> Options:
    each, columns = _round_up(tokens), product.outputs // NARROW
    if tokens > NARROW:
        if columns > product.processors and each <= LARGEST:
            return _tile(each, WIDE)
        return _tile(_round_up(-(-tokens // 2)), NARROW, programs=2)
    if 4 * columns > product.processors:  # fewer are split so often that one program each is faster
        third = columns > product.processors and each <= FEW_TOKENS
        return _tile(each, NARROW, programs=3 if third else 2)
    if columns * product.inputs // DEPTH < LONG * product.processors:
        return _tile(each, NARROW, stages=5)
    if each <= FEW_TOKENS and product.inputs % (2 * DEPTH) == 0:
        return _tile(each, NARROW, depth=2 * DEPTH)
    return _tile(each, NARROW, stages=6)


def _round_up(tokens: int) -> int:
    """Return the next multiple of 8: tiles have no other numbers of tokens."""
    return -(-tokens // 8) * 8


def _cost(product: Product, tokens: int, tile_tokens: int, split: bool) -> float:
    """Return about the time of a product of wide tiles; its unit is a step of a tile of one token.

    Tiles that are not split take whole waves. Others keep all multiprocessors busy, and what belongs
    to one tile is added up at the end.
    """
    tiles = -(-tokens // tile_tokens) * (product.outputs // WIDE)
    waves, step = tiles / product.processors, tile_tokens + TILE_COST
    steps = product.inputs / DEPTH
    if split:
        return waves * steps * step + SPLIT_COST * tile_tokens
    return math.ceil(waves) * steps * step


def _tile(
    tokens: int,
    outputs: int,
    *,
    programs: int = 1,
    stages: int = 4,
    split: bool = True,
    depth: int = DEPTH,
) -> Options:
    """Return humming's options for a tile of wgmma instructions fed by TMA.

    A step's product is issued before the next step's weights are read.

    Parameters
    ----------
    tokens, outputs, depth
        Of the tile, and inputs of a step.
    programs
        On a multiprocessor at a time.
    stages
        Steps that are read ahead.
    split
        Whether tiles are split along the inputs where the last wave is not full.
    """
    return {
        "mma_type": "wgmma",
        "block_shape": [tokens, outputs, depth],
        "warp_shape": [tokens, 32, DEPTH],
        "num_ctas_per_sm": programs,
        "num_stages": stages,
        "use_stream_k": split,
        "wgmma_split_issue_wait": True,
        "use_warp_spec": True,
        "use_tma": True,
    }
