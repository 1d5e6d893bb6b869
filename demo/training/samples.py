"""Training pages with queries, and what each part of a page shows.

A batch holds pages of one size, one row of token ids per query, the letters under each patch, and
for every query token the cells of its page where those letters stand.
"""

import random
import re
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from demo.drawing.sheet import Block, Box, Chart, Pairs, Paragraph, Sheet, Style, Table, Title, Word
from demo.drawing.text import Corpus, made_up_word, number
from demo.training.network import CELL, Shape
from demo.training.tokenizer import AUGMENTATION, PAD

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;-()/'\"$%&#=_+*?![]<>@"
CLASSES = len(LETTERS) + 2  # blank, the letters, anything else
SLOT_ROWS, SLOT_COLUMNS = 2, 4  # each patch of 16 x 16 pixels is read at 2 x 4 points
LONGEST = 32
SPELLING = Shape.embed_dim
SLOTS = SLOT_ROWS * SLOT_COLUMNS
_CLASS = {letter: index + 1 for index, letter in enumerate(LETTERS)}
UNWANTED = re.compile(
    r"italic|oblique|slant|hairline|thin|light|heavy|black|semi|demi|medium|extra|math|cond|display"
    r"|latinmodern|chorus|caps|dunh|unsl|quot|lmmonolt|lmmonoprop|lm[a-z]+(5|6|7|8|9|12|17)-"
    r"|_(k|dr|i|m|ri|rz|rzi|rbi)\.",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Difficulty:
    """What pages may look like.

    Attributes
    ----------
    small, large : float
        Range of the body text size in pixels.
    fonts : int
        How many of the fonts are used.
    grid : int
        Lines of every page lie on a multiple of this many pixels; 1 for anywhere.
    width, height : int
        Page size in pixels, multiples of 32.
    plain : float
        Share of pages set in Pillow's built-in font.
    twins : float
        Share of pages that repeat the one before with other numbers and a few other words.
    """

    small: float
    large: float
    fonts: int
    grid: int
    width: int
    height: int
    plain: float = 0.25
    twins: float = 0.0


@dataclass
class Batch:
    """One step's data.

    Attributes
    ----------
    pages : Tensor
        ``[pages, height, width]`` uint8 grey values.
    letters : Tensor
        ``[pages, patches, 8]`` class of the letter at each reading point.
    ids : Tensor
        ``[queries, seq]`` token ids, padded on the right.
    mask : Tensor
        ``[queries, seq]`` true on real tokens, the augmentation tokens included.
    owner : Tensor
        ``[queries]`` index of each query's page.
    tokens : Tensor
        ``[n, 2]`` query and position of the tokens whose letters stand on their page.
    here : Tensor
        ``[m, 2]`` token, and cell of all ``pages * cells`` where its letters stand on the query's
        own page.
    word : Tensor
        ``[n]`` index of each token's word.
    same : Tensor
        ``[m, 2]`` word, and cell of all ``pages * cells`` that it touches, on any page.
    also : Tensor
        ``[queries, pages]`` true on pages with all words of the query that its own page has.
    cell_spelling : Tensor
        ``[pages, cells, 128]`` spelling of what stands in each cell, zero in empty ones.
    token_spelling : Tensor
        ``[n, 128]`` spelling of the same tokens.
    words : int
        How many words ``word`` tells apart.
    number : int
        Tells drawn batches apart.
    """

    pages: Tensor
    letters: Tensor
    ids: Tensor
    mask: Tensor
    owner: Tensor
    tokens: Tensor
    here: Tensor
    word: Tensor
    same: Tensor
    also: Tensor
    cell_spelling: Tensor
    token_spelling: Tensor
    words: int
    number: int = 0


def find_fonts(folders: list[Path], held_out: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the upright text fonts below some folders as (training, held out).

    Pillow's built-in font (an empty path) always comes first in training.
    """
    paths = sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in {".ttf", ".otf", ".pfb"} and not UNWANTED.search(path.name)
    )
    held = [str(p) for p in paths if p.name.startswith(held_out)]
    used = [str(p) for p in paths if not p.name.startswith(held_out)]
    # A fixed shuffle: a prefix of the list then already mixes serif, sans and fixed pitch.
    random.Random(0).shuffle(used)
    return ["", *used], held


class PageMaker:
    """Draws random pages and asks for what stands on them.

    Parameters
    ----------
    corpus : Corpus
        Words and sentences.
    fonts : list of str
        Font files, the easiest first.
    tokenizer : Tokenizer
        Turns queries into ids.
    seed : int
        Seed of everything random here.
    """

    def __init__(self, corpus: Corpus, fonts: list[str], tokenizer: Tokenizer, seed: int) -> None:
        self.corpus = corpus
        self.fonts = fonts
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self._drawn: tuple[Style, float, list[Block]] | None = None

    def _word(self) -> str:
        kind = self.rng.random()
        if kind < 0.55:
            return self.rng.choice(self.corpus.words)
        if kind < 0.8:
            return made_up_word(self.corpus, self.rng)
        return self.rng.choice(self.corpus.words[:800])

    def _name(self, words: int) -> str:
        return " ".join(self._word() for _ in range(words)).title()

    def _text(self) -> str:
        if self.rng.random() < 0.5:
            return self.rng.choice(self.corpus.sentences)
        words = [self._word() for _ in range(self.rng.randint(5, 14))]
        for _ in range(self.rng.randint(0, 3)):
            words[self.rng.randrange(len(words))] = number(self.rng)
        return " ".join(words).capitalize() + "."

    def style(self, level: Difficulty) -> Style:
        """Return a random look of the given difficulty."""
        rng = self.rng
        fonts = self.fonts[: level.fonts]
        body = "" if rng.random() < level.plain else rng.choice(fonts)
        bold = body if rng.random() < 0.5 else rng.choice(fonts)
        shade = rng.randint(0, 60)
        paper = 255 if rng.random() < 0.7 else rng.randint(225, 255)
        accent = rng.randint(30, 120)
        if rng.random() < 0.08:
            shade, paper, accent = rng.randint(215, 255), rng.randint(0, 60), 150
        return Style(
            body=body,
            bold=bold,
            # Half pixels, so that letter widths can be kept for the next page.
            size=rng.randint(round(2 * level.small), round(2 * level.large)) / 2,
            title_scale=rng.uniform(1.0, 1.7),
            spacing=rng.uniform(1.12, 1.4),
            margin=rng.randint(2, max(4, level.width // 24)),
            grid=level.grid,
            ink=(shade,) * 3,
            paper=(paper,) * 3,
            accent=(accent,) * 3,
        )

    def page(self, level: Difficulty) -> Sheet:
        """Draw one page full of random blocks, or a twin of the page before."""
        rng = self.rng
        if self._drawn and rng.random() < level.twins:
            return self._twin(level, *self._drawn)
        sheet = Sheet(level.width, level.height, self.style(level))
        if level.grid == 1:
            sheet.y += rng.uniform(-2, 10)
        begin = sheet.y
        blocks: list[Block] = []
        block: Block
        if rng.random() < 0.6:
            block = Title(self._name(rng.randint(1, 4)))
            blocks.append(block)
            sheet.add(block, whole=False)
        misses = 0
        while misses < 3:
            kind = rng.random()
            if kind < 0.5:
                text = " ".join(self._text() for _ in range(rng.randint(1, 3)))
                block = Paragraph(text, rng.random() < 0.1)
                blocks.append(block)
                misses += not sheet.add(block, whole=False)
                continue
            count = rng.randint(1, 5)
            if kind < 0.7:
                block = Pairs(
                    [(self._name(rng.randint(1, 2)), self._value()) for _ in range(count)]
                )
            elif kind < 0.85:
                columns = rng.randint(2, 4)
                block = Table(
                    [self._name(1) for _ in range(columns)],
                    [
                        [self._name(1), *(self._value() for _ in range(columns - 1))]
                        for _ in range(count)
                    ],
                    rng.random() < 0.5,
                )
            elif kind < 0.93:
                block = Chart(
                    [self._name(1) for _ in range(count)],
                    [rng.randint(1, 999) for _ in range(count)],
                )
            else:
                block = Box(self._text())
            blocks.append(block)
            misses += not sheet.add(block)
        self._drawn = sheet.style, begin, blocks
        return sheet

    def _twin(self, level: Difficulty, style: Style, begin: float, blocks: list[Block]) -> Sheet:
        """Draw the same blocks in the same style with other numbers and a few other words."""
        sheet = Sheet(level.width, level.height, style)
        sheet.y = begin
        for block in blocks:
            sheet.add(self._varied(block), whole=not isinstance(block, Title | Paragraph))
        return sheet

    def _varied(self, block: Block) -> Block:
        if isinstance(block, Paragraph | Box):
            return replace(block, text=self._other(block.text))
        if isinstance(block, Pairs):
            return Pairs([(key, self._other(value)) for key, value in block.items])
        if isinstance(block, Table):
            rows = [[row[0], *(self._other(cell) for cell in row[1:])] for row in block.rows]
            return replace(block, rows=rows)
        if isinstance(block, Chart):
            return replace(block, values=[self.rng.randint(1, 999) for _ in block.values])
        return block

    def _other(self, text: str) -> str:
        """Return the text with most numbers and some words replaced."""
        words = []
        for word in text.split():
            if any(letter.isdigit() for letter in word):
                if self.rng.random() < 0.8:
                    word = re.sub("[0-9]", lambda _: str(self.rng.randrange(10)), word)
            elif len(word) > 3 and self.rng.random() < 0.06:
                other = self._word()
                word = other.title() if word.istitle() else other
            words.append(word)
        return " ".join(words)

    def _value(self) -> str:
        return number(self.rng) if self.rng.random() < 0.6 else self._name(self.rng.randint(1, 2))

    def query(self, sheet: Sheet) -> str:
        """Return a query about a page: some of its words, in or out of a template."""
        rng = self.rng
        lines = _lines(sheet.words)
        rows = [row for row in lines if len(" ".join(row)) > 5] or lines
        kind = rng.random()
        figures = [(row, i) for row in rows for i, word in enumerate(row) if _has_digit(word)]
        if kind < 0.2 and figures:
            row, place = rng.choice(figures)
            text = " ".join(row[max(0, place - rng.randint(0, 3)) : place + rng.randint(1, 3)])
        elif kind < 0.58:
            row = rng.choice(rows)
            begin = rng.randrange(max(1, len(row) - 2))
            text = " ".join(row[begin : begin + rng.randint(3, 8)])
        elif kind < 0.65:
            text = " ".join(lines[0])
        else:
            words = [word.text for word in sheet.words if len(word.text) > 3]
            words = words or [word.text for word in sheet.words]
            text = " ".join(rng.sample(words, min(len(words), rng.randint(2, 5))))
        if rng.random() < 0.5:
            text = text.strip(".,:;()")
        if rng.random() < 0.35:
            text = text.lower()
        if rng.random() < 0.4:
            # Words of the question that do not stand on the page must not mislead.
            words = text.split()
            for _ in range(rng.randint(1, 4)):
                words.insert(rng.randint(0, len(words)), rng.choice(self.corpus.words[:300]))
            text = " ".join(words)
        if rng.random() < 0.3:
            text = rng.choice(TEMPLATES).format(text)
        return text

    def batch(self, level: Difficulty, pages: int, queries: int) -> Batch:
        """Draw ``pages`` pages with ``queries`` queries each."""
        sheets: list[Sheet] = []
        self._drawn = None
        while len(sheets) < pages:
            sheet = self.page(level)
            if len(sheet.words) >= 4:
                sheets.append(sheet)
        asked = [(i, self.query(sheet)) for i, sheet in enumerate(sheets) for _ in range(queries)]
        return assemble(sheets, asked, self.tokenizer, LONGEST)


TEMPLATES = (
    "what is the {}?",
    "What is {}?",
    "Which page mentions {}?",
    "{} value",
    "page about {}",
    "where is {} listed?",
    "How many {}?",
    "Who is {}?",
    "When was {}?",
    "find {}",
    "{} in the table",
    "the {} of the report",
)


def _has_digit(word: str) -> bool:
    return any(letter.isdigit() for letter in word)


def _lines(words: list[Word]) -> list[list[str]]:
    """Return the words of each line of a page; what stands side by side is one line."""
    lines: list[list[str]] = []
    top = bottom = -1.0
    for word in words:
        if not lines or not top < (word.top + word.bottom) / 2 < bottom:
            lines.append([])
            top, bottom = word.top, word.bottom
        lines[-1].append(word.text)
    return lines


def _runs(text: str) -> list[tuple[str, int, int]]:
    """Split a text into lower-case runs of letters or digits with begin and end."""
    return [(m[0].lower(), m.start(), m.end()) for m in re.finditer(r"[A-Za-z]+|[0-9]+", text)]


@lru_cache(maxsize=200_000)
def _letter_spelling(letters: str) -> NDArray[np.float32]:
    """Return the vector of the last of up to three letters.

    It sums fixed random vectors of the letter, of the pair and of the triple that it ends.
    """
    total = np.zeros(SPELLING, np.float32)
    for length, weight in ((1, 0.5), (2, 1.0), (3, 1.0)):
        noise = np.random.default_rng(zlib.crc32(letters[-length:].encode()))
        total += np.float32(weight) * noise.standard_normal(SPELLING, np.float32)
    return total


def spelling(run: str, begin: int, end: int) -> NDArray[np.float32]:
    """Return the spelling of the letters ``begin`` to ``end`` of a run: the sum over them.

    A letter's vector depends on the two before it, as a causal text tower sees them, so the same
    letters get nearly the same vector on a page and in a query, whatever the words around.
    """
    padded = "^^" + run
    total = np.zeros(SPELLING, np.float32)
    for i in range(begin, end):
        total += _letter_spelling(padded[i : i + 3])
    return total


def _cell_spelling(sheets: list[Sheet], columns: int, rows: int) -> NDArray[np.float32]:
    """Return the summed spelling of the letters in each cell ``[pages, cells, 128]``."""
    result = np.zeros((len(sheets), rows * columns, SPELLING), np.float32)
    for page, sheet in enumerate(sheets):
        for word in sheet.words:
            row = min(rows - 1, int((word.top + word.bottom) / 2 // CELL))
            for run, begin, end in _runs(word.text):
                padded = "^^" + run
                for i in range(begin, end):
                    middle = (word.edges[i] + word.edges[i + 1]) / 2
                    column = int(middle // CELL)
                    if column < columns:
                        cell = row * columns + column
                        result[page, cell] += _letter_spelling(padded[i - begin : i - begin + 3])
    return result


def grey(sheet: Sheet) -> NDArray[np.uint8]:
    """Return the mean of the colour channels ``[height, width]``, all that this model looks at."""
    colours = np.asarray(sheet.image).astype(np.uint16)
    return ((colours[..., 0] + colours[..., 1] + colours[..., 2]) // 3).astype(np.uint8)


def letter_map(sheet: Sheet) -> NDArray[np.uint8]:
    """Return the class of the letter at every reading point of a page.

    Returns
    -------
    ndarray
        ``[height / 8, width / 4]``: 0 where no letter stands.
    """
    result = np.zeros((sheet.height // 8, sheet.width // 4), np.uint8)
    centres = np.arange(result.shape[1]) * 4 + 2.0
    for word in sheet.words:
        classes = np.array([_CLASS.get(c.lower(), CLASSES - 1) for c in word.text], np.uint8)
        edges = np.array(word.edges)
        first, last = np.searchsorted(centres, (edges[0], edges[-1]))
        letter = np.searchsorted(edges, centres[first:last], side="right") - 1
        # Rows whose centre lies between capital height and a little under the baseline.
        top = max(0, int(np.ceil((word.top - 4) / 8)))
        bottom = int(np.floor((word.bottom + 1 - 4) / 8)) + 1
        if bottom <= top:
            top = max(0, int((word.top + word.bottom) / 16))
            bottom = top + 1
        result[top:bottom, first:last] = classes[np.minimum(letter, len(classes) - 1)]
    return result


def _cells(word: Word, begin: int, end: int, columns: int, rows: int, loose: bool) -> list[int]:
    """Return the cells in which the letters ``begin`` to ``end`` of a word stand."""
    left, right = word.edges[begin], word.edges[end]
    trim = 0.0 if loose else 0.3
    wide, high = trim * (right - left), trim * (word.bottom - word.top)
    first, last = int((left + wide) // CELL), int((right - wide - 1e-3) // CELL)
    upper, lower = int((word.top + high) // CELL), int((word.bottom - high) // CELL)
    return [
        row * columns + column
        for row in range(max(0, upper), min(rows - 1, lower) + 1)
        for column in range(max(0, first), min(columns - 1, last) + 1)
    ]


def assemble(
    sheets: list[Sheet], asked: list[tuple[int, str]], tokenizer: Tokenizer, limit: int
) -> Batch:
    """Turn drawn pages and their queries into tensors.

    Parameters
    ----------
    sheets : list of Sheet
        Pages of one size.
    asked : list of (int, str)
        Page index and text of every query.
    tokenizer : Tokenizer
        Turns queries into ids.
    limit : int
        Tokens of a query before the augmentation tokens; the rest is cut off.
    """
    columns, rows = sheets[0].width // CELL, sheets[0].height // CELL
    cells = columns * rows
    pages = np.stack([grey(sheet) for sheet in sheets])
    maps = np.stack([letter_map(sheet) for sheet in sheets])
    blocks = maps.reshape(len(sheets), rows, 2, SLOT_ROWS, columns, 2, SLOT_COLUMNS)
    letters = blocks.transpose(0, 1, 4, 2, 5, 3, 6).reshape(len(sheets), cells * 4, SLOTS)
    places: dict[str, list[tuple[int, Word, int]]] = {}
    for page, sheet in enumerate(sheets):
        for word in sheet.words:
            for run, begin, _ in _runs(word.text):
                places.setdefault(run, []).append((page, word, begin))
    pad = tokenizer.get_vocab()[PAD]
    encoded = tokenizer.encode_batch([text for _, text in asked])
    for encoding in encoded:
        encoding.truncate(limit)
    longest = max((len(e.ids) for e in encoded), default=0) + AUGMENTATION
    ids = torch.full((len(asked), longest), pad)
    mask = torch.zeros(len(asked), longest, dtype=torch.bool)
    tokens: list[tuple[int, int]] = []
    here: list[tuple[int, int]] = []
    same: list[tuple[int, int]] = []
    words: list[int] = []
    spelt: list[NDArray[np.float32]] = []
    known: dict[str, int] = {}
    also = torch.ones(len(asked), len(sheets), dtype=torch.bool)
    for query, ((page, text), encoding) in enumerate(zip(asked, encoded, strict=True)):
        ids[query, : len(encoding.ids)] = torch.tensor(encoding.ids)
        mask[query, : len(encoding.ids) + AUGMENTATION] = True
        runs = _runs(text)
        for run in {run for run, _, _ in runs}:
            holders = {p[0] for p in places.get(run, [])}
            if page in holders:
                row = torch.zeros(len(sheets), dtype=torch.bool)
                row[list(holders)] = True
                also[query] &= row
        for position, (start, stop) in enumerate(encoding.offsets):
            for run, begin, end in runs:
                low, high = max(start, begin), min(stop, end)
                own = [p for p in places.get(run, []) if p[0] == page] if low < high else []
                if not own:
                    continue
                spots = [
                    (len(tokens), page * cells + cell)
                    for _, word, offset in own
                    for cell in _cells(
                        word, offset + low - begin, offset + high - begin, columns, rows, False
                    )
                ]
                if not spots:
                    continue
                if run not in known:
                    known[run] = len(known)
                    for other, word, offset in places[run]:
                        near = _cells(word, offset, offset + len(run), columns, rows, True)
                        same += [(known[run], other * cells + cell) for cell in near]
                tokens.append((query, position))
                here += spots
                words.append(known[run])
                spelt.append(spelling(run, low - begin, high - begin))
                break
    return Batch(
        pages=torch.from_numpy(pages),
        letters=torch.from_numpy(letters.copy()),
        ids=ids,
        mask=mask,
        owner=torch.tensor([page for page, _ in asked]),
        tokens=torch.tensor(tokens, dtype=torch.long).view(-1, 2),
        here=torch.tensor(here, dtype=torch.long).view(-1, 2),
        word=torch.tensor(words, dtype=torch.long),
        same=torch.tensor(same, dtype=torch.long).view(-1, 2),
        also=also,
        cell_spelling=torch.from_numpy(
            _cell_spelling(sheets, columns, rows)
            if asked
            else np.zeros((len(sheets), 0, SPELLING), np.float32)
        ),
        token_spelling=torch.from_numpy(np.array(spelt, np.float32).reshape(-1, SPELLING)),
        words=len(known),
    )
