"""Tiles of humming's 4-bit products on an H100, where others than its own are faster.

A product of [tokens, inputs] and [inputs, outputs] is cut into tiles of tokens x outputs. humming
takes the fewest tiles along the tokens, whatever that leaves to the last wave of them, and always
splits the reduction of tiles to fill it ("stream-K"). Each choice here was timed against humming's
own on the shapes of the 4B model, see docs/benchmarks.md.
"""

from typing import Any, NamedTuple

Options = dict[str, Any]
Range = list[Any]
"""More tokens than the first number, at most the second, and humming's options for those."""

CAPABILITY = (9, 0)
"""Of the GPUs whose tiles these are."""
MINIMUM_PROCESSORS = 100
"""Multiprocessors; a card of that capability with fewer has less arithmetic for its memory."""
NARROW, WIDE, DEPTH = 128, 256, 64
"""Outputs of a tile, and inputs of a step."""
OWN_UP_TO, OWN_BEYOND = 16, 2048
"""Tokens outside of which humming's own tiles are taken: others were not faster, or not surely."""
WAVES_FROM = 256
"""Tokens beyond which tiles are chosen by what `_cost` estimates."""
TOKENS = (88, 104, 120, 128, 144, 152, 168, 184)
"""Of a wide tile, to choose from."""
SPLIT_COST, TILE_COST = 16, 48
"""Of `_cost`: what agreed best with the times of 330 products of 416 to 1,664 tokens."""
ISSUE_FIRST_UP_TO = 120
"""Tokens of a wide tile up to which a product is issued before the next weights are read."""
FEW_TOKENS = 56
"""Tokens of a tile up to which more programs fit on a multiprocessor, or deeper steps."""
LONG = 16
"""Steps for each multiprocessor from which a product is long."""


class Product(NamedTuple):
    """A linear on a card with so many multiprocessors."""

    inputs: int
    outputs: int
    processors: int

    def tiles(self, tokens: int, of: int) -> int:
        """Return how many wide tiles `of` so many tokens there are."""
        return -(-tokens // of) * (self.outputs // WIDE)


def suits(capability: tuple[int, int], bits: int, product: Product) -> bool:
    """Whether these tiles are for such a card and linear."""
    known = capability == CAPABILITY and product.processors >= MINIMUM_PROCESSORS
    return known and bits == 4 and product.outputs % WIDE == 0 and product.inputs % DEPTH == 0


def replace_tiles(own: list[Range], product: Product) -> list[Range]:
    """Return humming's own ranges of tokens with the tiles of this module between them."""
    small = [[start, min(end, OWN_UP_TO), o] for start, end, o in own if start < OWN_UP_TO]
    large = [[max(start, OWN_BEYOND), end, o] for start, end, o in own if end > OWN_BEYOND]
    ranges: list[Range] = []
    for tokens in range(OWN_UP_TO + 8, OWN_BEYOND + 1, 8):
        options = choose_tile(product, tokens)
        if ranges and ranges[-1][2] == options:
            ranges[-1][1] = tokens
        else:
            ranges.append([tokens - 8, tokens, options])
    return [*small, *ranges, *large]


def choose_tile(product: Product, tokens: int) -> Options:
    """Return the options of a product of so many tokens, more than 16 and at most 2,048."""
    if tokens > WAVES_FROM:
        pairs = [(of, split) for of in TOKENS for split in (False, True)]
        of, split = min(pairs, key=lambda pair: _cost(product, tokens, *pair))
        return _tile(of, WIDE, split=split, issue_first=split and of <= ISSUE_FIRST_UP_TO)
    if tokens > NARROW:
        return _tile(_eights(-(-tokens // 2)), NARROW, programs=2)
    of, columns = _eights(tokens), product.outputs // NARROW
    if 4 * columns > product.processors:
        crowded = columns > product.processors and of <= FEW_TOKENS
        return _tile(of, NARROW, programs=3 if crowded else 2)
    if columns * product.inputs // DEPTH < LONG * product.processors:
        return _tile(of, NARROW, stages=5)
    if of <= FEW_TOKENS and product.inputs % (2 * DEPTH) == 0:
        return _tile(of, NARROW, depth=2 * DEPTH)
    return _tile(of, NARROW, stages=6)


def _eights(tokens: int) -> int:
    return -(-tokens // 8) * 8


def _cost(product: Product, tokens: int, of: int, split: bool) -> float:
    """Return the time of a product of wide tiles, in steps of one token.

    Whole tiles take whole waves. Split ones leave no processor idle, and are added up at the end.
    """
    waves = product.tiles(tokens, of) / product.processors
    steps = product.inputs / DEPTH
    if split:
        return waves * steps * (of + TILE_COST) + SPLIT_COST * of
    return -(-waves // 1) * steps * (of + TILE_COST)


def _tile(
    tokens: int,
    outputs: int,
    *,
    programs: int = 1,
    stages: int = 4,
    split: bool = True,
    issue_first: bool = True,
    depth: int = DEPTH,
) -> Options:
    """Return humming's options for a tile of wgmma instructions fed by TMA.

    Parameters
    ----------
    tokens, outputs, depth
        Of the tile, and inputs of a step.
    programs
        On a multiprocessor at a time.
    stages
        Steps that are read ahead.
    split
        Whether tiles are split along the inputs to fill the last wave.
    issue_first
        Whether a step's product is issued before the next step's weights are read.
    """
    return {
        "mma_type": "wgmma",
        "block_shape": [tokens, outputs, depth],
        "warp_shape": [tokens, 32, DEPTH],
        "num_ctas_per_sm": programs,
        "num_stages": stages,
        "use_stream_k": split,
        "wgmma_split_issue_wait": issue_first,
        "use_warp_spec": True,
        "use_tma": True,
    }
