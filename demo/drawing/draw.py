"""Draw the page sets and the calibration texts: ``python -m demo.drawing.draw [SET ...] [--texts]``.

Only Pillow's built-in font is used, and every random choice is seeded, so the same Pillow version
draws the same bytes.  The sets follow the BEIR convention: ``corpus/<id>.png``, ``queries.jsonl``
and ``qrels.tsv``.  The texts are docstrings of the Python that runs the program (PSF licence), so
another Python version may give other ones.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer

from demo.drawing.sheet import Block, Box, Chart, Pairs, Paragraph, Sheet, Style, Table, Title
from demo.drawing.text import harvest
from demo.drawing.words import (
    CALIBRATION,
    EVALUATION,
    POOLS,
    SECOND_EVALUATION,
    SECOND_POOLS,
    Theme,
)

SIZES = ((448, 576), (576, 448), (512, 384), (640, 448), (384, 512))
ACCENTS = ((38, 84, 140), (150, 52, 44), (34, 110, 70), (96, 60, 130), (70, 70, 70))
PAPERS = ((255, 255, 255), (255, 255, 255), (252, 248, 236), (240, 246, 250))
COLOURS = 48
TEXTS = 64
TEXT_TOKENS = 120, 250


def half(pools: dict[str, tuple[str, ...]], first: int) -> dict[str, tuple[str, ...]]:
    """Return every second entry of each pool, from the entry ``first`` on.

    Months, weather and colours are too few to split; they stand in body text only.
    """
    whole = {"month", "weather", "colour"}
    return {name: pool if name in whole else pool[first::2] for name, pool in pools.items()}


@dataclass(frozen=True)
class PageSet:
    """What one set is drawn from.

    Attributes
    ----------
    name : str
        Folder name.
    prefix : str
        Start of the ids.
    seed : int
        Seed of every choice.
    themes : tuple of Theme
        Kinds of documents.
    pools : dict
        What each kind of value is chosen from.
    groups : int
        Groups of pages that share title and looks.
    group : int
        Pages in a group.
    queries : int
        Queries a page.
    sizes : tuple of float
        Sizes of the body text in pixels.
    close : bool
        Whether the pages of a group also share names, items and sentences and differ in numbers,
        codes, dates and at most one name.
    """

    name: str
    prefix: str
    seed: int
    themes: tuple[Theme, ...]
    pools: dict[str, tuple[str, ...]]
    groups: int
    group: int = 3
    queries: int = 2
    sizes: tuple[float, ...] = (12.0, 13.0, 14.0, 14.0, 15.0, 16.0, 17.0)
    close: bool = False


SETS = (
    PageSet("evaluation", "eval", 2026, EVALUATION, half(POOLS, 0), 42),
    PageSet("calibration", "cali", 4051, CALIBRATION, half(POOLS, 1), 16),
    PageSet(
        "evaluation2",
        "hard",
        6073,
        SECOND_EVALUATION,
        SECOND_POOLS,
        25,
        group=4,
        sizes=(10.5, 11.0, 11.5, 12.0, 13.0, 14.0, 15.0),
        close=True,
    ),
)


@dataclass(frozen=True)
class Page:
    """A drawn page and what its queries are made of.

    Attributes
    ----------
    image : Image
        The page in its final colours.
    text : str
        All its drawn words in lower case, separated by single spaces.
    facts : dict
        Values by the name used in sentences and questions.
    theme : Theme
        Its kind of document.
    """

    image: Image.Image
    text: str
    facts: dict[str, str]
    theme: Theme


class Writer:
    """Fills the themes of one set with values.

    ``figures`` draws numbers, codes and dates.  In a set of close pages it goes its own way while
    ``rng`` starts again for every page of a group.
    """

    def __init__(self, plan: PageSet) -> None:
        self.plan = plan
        self.rng = random.Random(plan.seed)
        self.figures = random.Random(plan.seed + 1) if plan.close else self.rng

    def _value(self, pool: str) -> str:
        rng, figures, pools = self.rng, self.figures, self.plan.pools
        if pool.startswith("person"):
            return f"{rng.choice(pools['first'])} {rng.choice(pools['last'])}"
        if pool == "number":
            return str(figures.randint(11, 99))
        if pool.startswith("code"):
            return f"{figures.choice('ABCDEFGHJKLMNPRSTUVWXYZ')}{figures.randint(100, 999)}"
        if pool == "date":
            day = figures.randint(1, 28)
            return f"{day} {figures.choice(pools['month'])} {figures.randint(2019, 2030)}"
        return rng.choice(pools[pool])

    def group(self, theme: Theme, title: str, place: str) -> list[Page]:
        """Draw the pages that share a title and looks."""
        style, size = self._style(), self.rng.choice(SIZES)
        start = self.rng.getstate()
        pages = []
        for _ in range(self.plan.group):
            if self.plan.close:
                self.rng.setstate(start)
            pages.append(self.page(theme, title, place, style, size))
        return pages

    def _style(self) -> Style:
        rng = self.rng
        return Style(
            size=rng.choice(self.plan.sizes),
            title_scale=rng.choice((1.3, 1.5, 1.7)),
            spacing=rng.choice((1.2, 1.3, 1.4)),
            margin=rng.choice((14, 20, 26)),
            ink=rng.choice(((15, 15, 15), (30, 30, 60), (45, 35, 30))),
            paper=rng.choice(PAPERS),
            accent=rng.choice(ACCENTS),
        )

    def page(
        self, theme: Theme, title: str, place: str, style: Style, size: tuple[int, int]
    ) -> Page:
        """Write and draw one page; a group passes the same title, style and size each time."""
        rng = self.rng
        facts = {key.lower(): self._value(pool) for key, pool in theme.fields}
        if self.plan.close and self.figures.random() < 0.5:
            key, pool = theme.fields[self.figures.randrange(2)]
            facts[key.lower()] = self.figures.choice(self._names(pool))
        items = rng.sample(list(self.plan.pools[theme.items]), rng.randint(3, 5))
        facts |= {"place": place, "item": items[0], "item2": items[1]}
        pairs = Pairs([(key, facts[key.lower()]) for key, _ in theme.fields])
        rows = [
            [item, *(str(self.figures.randint(12, 980)) for _ in theme.columns[1:])]
            for item in items
        ]
        facts |= {"figure": rows[0][1], "figure2": rows[1][2]}
        table: Block = Table([*theme.columns], rows, rng.random() < 0.5)
        sentences = [self._sentence(line, facts, items) for line in theme.sentences]
        rng.shuffle(sentences)
        cut = rng.randint(2, 3)
        body: list[Block] = [Paragraph(" ".join(sentences[:cut]))]
        middle: list[Block] = [pairs, table]
        rng.shuffle(middle)
        extra: list[Block] = [
            Box(sentences[cut]),
            Paragraph(" ".join(sentences[cut + 1 :]), small=True),
            Chart(list(items[:3]), [int(row[1]) for row in rows[:3]]),
        ]
        rng.shuffle(extra)
        sheet = Sheet(*size, style)
        sheet.add(Title(title))
        for block in (*middle[:1], *body, *middle[1:], *extra):
            sheet.add(block)
        text = " ".join(word.text for word in sheet.words).lower()
        image = sheet.image.quantize(
            COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        return Page(image, text, facts, theme)

    def _names(self, pool: str) -> list[str]:
        """Return all that a field of names can hold."""
        pools = self.plan.pools
        if not pool.startswith("person"):
            return list(pools[pool])
        return [f"{first} {last}" for first in pools["first"] for last in pools["last"]]

    def _sentence(self, line: str, facts: dict[str, str], items: Sequence[str]) -> str:
        names = [n for n in ("month", "weather", "colour", "room") if n in self.plan.pools]
        values = {name: self._value(name) for name in names}
        filled = line.format(**(values | facts | {"item": self.rng.choice(items)}))
        return filled[0].upper() + filled[1:]

    def query(self, page: Page) -> tuple[str, list[str]]:
        """Return a question about the page and the values that its answer page must show."""
        question = self.rng.choice(page.theme.questions)
        values = dict(page.facts)
        if "room" in self.plan.pools:
            values = {"room": self._value("room"), **values}
        names = re.findall(r"{([^}]+)}", question)
        return question.format(**values), [values[name].lower() for name in names]


def shows(page: Page, needs: list[str]) -> bool:
    """Return whether each of some words, in lower case, stands on the page as a whole."""
    return all(re.search(rf"(?<!\w){re.escape(need)}(?!\w)", page.text) for need in needs)


def draw_set(plan: PageSet, root: Path) -> None:
    """Draw one set below ``root``.

    Parameters
    ----------
    plan : PageSet
        What to draw.
    root : Path
        Folder that gets a folder of the set's name.
    """
    writer = Writer(plan)
    pages: list[Page] = []
    titles: set[str] = set()
    while len(pages) < plan.group * plan.groups:
        theme = plan.themes[len(pages) // plan.group % len(plan.themes)]
        place = writer.rng.choice(plan.pools["place"])
        title = theme.title.format(place=place)
        if title not in titles:
            titles.add(title)
            pages += writer.group(theme, title, place)
    folder = root / plan.name
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    names = [f"{plan.prefix}-{index:03d}" for index in range(len(pages))]
    for name, page in zip(names, pages, strict=True):
        page.image.save(folder / "corpus" / f"{name}.png", optimize=True)
    asked: dict[str, list[str]] = {}
    for page in pages:
        begin = len(asked)
        for _ in range(60):
            text, needs = writer.query(page)
            right = [n for n, p in zip(names, pages, strict=True) if shows(p, needs)]
            # A page too full to show a value leaves the question without an answer.
            if text not in asked and shows(page, needs) and len(right) <= 2:
                asked[text] = right
            if len(asked) == begin + plan.queries:
                break
    queries, qrels = [], ["query-id\tcorpus-id\tscore"]
    for index, (text, right) in enumerate(asked.items()):
        name = f"{plan.prefix}-q{index:03d}"
        queries.append(json.dumps({"_id": name, "text": text}))
        qrels += [f"{name}\t{page}\t1" for page in right]
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n", "utf-8")
    (folder / "qrels.tsv").write_text("\n".join(qrels) + "\n", "utf-8")
    print(f"{plan.name}: {len(pages)} pages, {len(queries)} queries")


def write_texts(tokenizer: Tokenizer, seed: int, path: Path) -> None:
    """Write passages for calibration without images, of 120 to 250 tokens each.

    Sentences of the standard library's docstrings follow each other until a passage is long
    enough; no sentence is used twice.

    Parameters
    ----------
    tokenizer : Tokenizer
        Counts the tokens.
    seed : int
        Seed of the order of the sentences and of the lengths.
    path : Path
        File of one ``{"_id", "text"}`` a line.
    """
    rng = random.Random(seed)
    sentences = harvest(seed).sentences
    rng.shuffle(sentences)
    rest = iter(sentences)
    lines = []
    for index in range(TEXTS):
        # A sentence has at most 30 words, so one more cannot go far beyond this.
        length, text = rng.randint(TEXT_TOKENS[0], TEXT_TOKENS[1] - 60), ""
        while len(tokenizer.encode(text).ids) < length:
            longer = f"{text} {next(rest)}".strip()
            if len(tokenizer.encode(longer).ids) <= TEXT_TOKENS[1]:
                text = longer
        lines.append(json.dumps({"_id": f"text-{index:03d}", "text": text}))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{path.name}: {len(lines)} passages")


def main() -> None:
    """Draw the chosen sets, or all of them, and write the texts if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    names = [plan.name for plan in SETS]
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"{', '.join(names)}; all if none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pages")
    parser.add_argument("--texts", action="store_true", help="calibration texts instead of pages")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    options = parser.parse_args()
    if unknown := set(options.sets) - set(names):
        parser.error(f"no such set: {', '.join(sorted(unknown))}")
    if options.texts:
        tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
        write_texts(tokenizer, 7, options.out / "calibration" / "texts.jsonl")
        return
    for plan in SETS:
        if plan.name in (options.sets or names):
            draw_set(plan, options.out)


if __name__ == "__main__":
    main()
