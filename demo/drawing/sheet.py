"""Drawing documents with Pillow and remembering where each word stands.

Text flows down a page block by block: titles, paragraphs, key-value lists, tables, bar charts and
shaded boxes.  Every drawn word keeps the horizontal edges of its letters, from which training
derives what each patch of the page shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


@lru_cache(maxsize=4096)
def load_font(path: str, size: float) -> ImageFont.FreeTypeFont:
    """Return a font of ``size`` pixels; an empty path means Pillow's built-in font."""
    if path:
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType")
    return font


@lru_cache(maxsize=4096)
def _line_metrics(path: str, size: float) -> tuple[float, float]:
    """Return how far capitals and the baseline lie below the drawing origin, in pixels."""
    _, top, _, bottom = load_font(path, size).getbbox("H")
    return top, bottom


@lru_cache(maxsize=400_000)
def _advance(path: str, size: float, letter: str) -> float:
    """Return the advance width of one letter in pixels."""
    return load_font(path, size).getlength(letter)


def _length(path: str, size: float, text: str) -> float:
    """Return the width of a text without kerning, in pixels."""
    return sum(_advance(path, size, letter) for letter in text)


@dataclass(frozen=True)
class Word:
    """One drawn word.

    Attributes
    ----------
    text : str
        The word as drawn, without spaces.
    edges : tuple of float
        Left edge of each letter and the right edge of the last, in pixels.
    top, bottom : float
        Capital height and baseline, in pixels from the top of the page.
    line : int
        Index of the drawn line; words of one line follow each other.
    """

    text: str
    edges: tuple[float, ...]
    top: float
    bottom: float
    line: int


@dataclass(frozen=True)
class Style:
    """How a page looks.

    Attributes
    ----------
    body, bold : str
        Font files of the text and of titles; empty for Pillow's built-in font.
    size : float
        Height of the body text in pixels.
    title_scale : float
        Title size over body size.
    spacing : float
        Distance of lines over the font size.
    margin : int
        White border in pixels.
    grid : int
        Lines are moved down to a multiple of this many pixels; 1 leaves them.
    ink, paper, accent : tuple of int
        Colours of text, background, and of rules, bars and boxes.
    """

    body: str = ""
    bold: str = ""
    size: float = 14.0
    title_scale: float = 1.5
    spacing: float = 1.3
    margin: int = 16
    grid: int = 1
    ink: Colour = (20, 20, 20)
    paper: Colour = (255, 255, 255)
    accent: Colour = (40, 80, 140)


@dataclass(frozen=True)
class Title:
    """A heading in the title size."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text, wrapped to the page width; ``small`` for captions and notes."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Pairs:
    """A list of ``key: value`` lines."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of equal length under a header row, with or without rules."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    ruled: bool = True


@dataclass(frozen=True)
class Chart:
    """Horizontal bars with a label and a number each."""

    labels: Sequence[str]
    values: Sequence[int]


@dataclass(frozen=True)
class Box:
    """A shaded box with light text on the accent colour."""

    text: str


Block = Title | Paragraph | Pairs | Table | Chart | Box


@dataclass
class Sheet:
    """A page being drawn.

    Attributes
    ----------
    width, height : int
        Size in pixels.
    style : Style
        How the page looks.
    words : list of Word
        What was drawn so far.
    y : float
        Where the next line begins, in pixels from the top.
    """

    width: int
    height: int
    style: Style
    words: list[Word] = field(default_factory=list)
    y: float = 0.0
    _line: int = 0

    def __post_init__(self) -> None:
        """Start with an empty page."""
        self.image = Image.new("RGB", (self.width, self.height), self.style.paper)
        self._draw = ImageDraw.Draw(self.image)
        self.y = float(self.style.margin)

    def _write(self, x: float, text: str, path: str, size: float, fill: Colour, y: float) -> float:
        """Draw one line of text and record its words; return the right end in pixels."""
        font = load_font(path, size)
        # Whole pixels, because the drawing rounds the origin too.
        left, top = round(x), round(y)
        self._draw.text((left, top), text, font=font, fill=fill)
        cap, base = _line_metrics(path, size)
        length = font.getlength(text)
        plain = _length(path, size, text)
        stretch = length / plain if plain else 1.0  # kerning, spread over the line
        position, edges, word = float(left), [float(left)], ""
        for letter in text + " ":
            if letter == " ":
                if word:
                    self.words.append(Word(word, tuple(edges), top + cap, top + base, self._line))
                position += _advance(path, size, " ") * stretch
                word, edges = "", [position]
            else:
                position += _advance(path, size, letter) * stretch
                word += letter
                edges.append(position)
        self._line += 1
        return left + length

    def _next_line(self, size: float) -> float:
        """Return where a line of this size begins, on the grid of the style."""
        grid = self.style.grid
        return self.y if grid == 1 else -(-self.y // grid) * grid

    def _room(self, lines: int, size: float) -> bool:
        need = lines * max(size * self.style.spacing, float(self.style.grid))
        return self._next_line(size) + need <= self.height - self.style.margin / 2

    def _wrap(self, text: str, path: str, size: float, width: float) -> list[str]:
        lines, current, filled = [], "", 0.0
        for word in text.split():
            length = _length(path, size, word)
            longer = filled + _advance(path, size, " ") + length
            if current and longer > width:
                lines.append(current)
                current, filled = word, length
            else:
                current, filled = (f"{current} {word}", longer) if current else (word, length)
        return [*lines, current] if current else lines

    def _flow(self, text: str, path: str, size: float, fill: Colour, whole: bool = True) -> bool:
        """Draw wrapped text; with ``whole`` nothing is drawn unless all of it fits."""
        margin = self.style.margin
        lines = self._wrap(text, path, size, self.width - 2 * margin)
        if whole and not self._room(len(lines), size):
            return False
        for line in lines:
            if not self._room(1, size):
                return False
            y = self._next_line(size)
            self._write(margin, line, path, size, fill, y)
            self.y = y + size * self.style.spacing
        return True

    def add(self, block: Block, whole: bool = True) -> bool:
        """Draw one block below the last.

        Parameters
        ----------
        block : Block
            What to draw.
        whole : bool
            Draw a paragraph only if all its lines fit; otherwise it may be cut at the page end.

        Returns
        -------
        bool
            Whether the block was drawn to its end.
        """
        style, size = self.style, self.style.size
        gap = 0.5 * size
        if isinstance(block, Title):
            scaled = round(2 * size * style.title_scale) / 2
            done = self._flow(block.text, style.bold, scaled, style.ink, whole)
        elif isinstance(block, Paragraph):
            scaled = round(2 * size * 0.85) / 2 if block.small else size
            done = self._flow(block.text, style.body, scaled, style.ink, whole)
        elif isinstance(block, Pairs):
            done = self._pairs(block)
        elif isinstance(block, Table):
            done = self._table(block)
        elif isinstance(block, Chart):
            done = self._chart(block)
        else:
            done = self._box(block)
        if done:
            self.y += gap
        return done

    def _pairs(self, block: Pairs) -> bool:
        style, size = self.style, self.style.size
        if not self._room(len(block.items), size):
            return False
        for key, value in block.items:
            y = self._next_line(size)
            end = self._write(style.margin, f"{key}:", style.bold, size, style.ink, y)
            self._write(end + 0.4 * size, value, style.body, size, style.ink, y)
            self.y = y + size * style.spacing
        return True

    def _table(self, block: Table) -> bool:
        style, size = self.style, self.style.size
        if not self._room(len(block.rows) + 1, size):
            return False
        margin = style.margin
        inner = self.width - 2 * margin
        lengths = [
            max(_length(style.bold, size, cell) for cell in column)
            for column in zip(block.header, *block.rows, strict=True)
        ]
        if sum(lengths) + 0.6 * size * len(lengths) > inner:
            return False
        spare = (inner - sum(lengths)) / len(lengths)
        lefts = [margin + sum(lengths[:i]) + spare * i for i in range(len(lengths))]
        for row, cells in enumerate((block.header, *block.rows)):
            y = self._next_line(size)
            for left, cell in zip(lefts, cells, strict=True):
                path = style.body if row else style.bold
                self._write(left, cell, path, size, style.ink, y)
            self.y = y + size * style.spacing
            if block.ruled or row == 0:
                rule = round(self.y - 0.08 * size)
                self._draw.line((margin, rule, self.width - margin, rule), fill=style.accent)
        return True

    def _chart(self, block: Chart) -> bool:
        style, size = self.style, self.style.size
        if not self._room(len(block.labels), size):
            return False
        margin = style.margin
        labels = max(_length(style.body, size, label) for label in block.labels) + 0.6 * size
        room = self.width - 2 * margin - labels - 3.5 * size
        if room < 2 * size:
            return False
        for label, value in zip(block.labels, block.values, strict=True):
            y = self._next_line(size)
            self._write(margin, label, style.body, size, style.ink, y)
            left = margin + labels
            right = left + room * value / max(block.values)
            bar = (round(left), round(y + 0.2 * size), round(right), round(y + size))
            self._draw.rectangle(bar, fill=style.accent)
            self._write(right + 0.4 * size, str(value), style.body, size, style.ink, y)
            self.y = y + size * style.spacing
        return True

    def _box(self, block: Box) -> bool:
        style, size = self.style, self.style.size
        margin = style.margin
        lines = self._wrap(block.text, style.body, size, self.width - 2 * margin - size)
        if not self._room(len(lines) + 1, size):
            return False
        first = self._next_line(size)
        pitch = max(size * style.spacing, float(style.grid))
        bottom = first + pitch * len(lines) + 0.2 * size
        self._draw.rectangle(
            (margin, round(first - 0.3 * size), self.width - margin, round(bottom)),
            fill=style.accent,
        )
        for line in lines:
            y = self._next_line(size)
            self._write(margin + 0.5 * size, line, style.body, size, style.paper, y)
            self.y = y + size * style.spacing
        self.y = bottom + 0.3 * size
        return True
