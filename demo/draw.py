"""Draw the evaluation and calibration page sets: ``python -m demo.draw``.

Only Pillow's built-in font is used, and every random choice is seeded, so the same Pillow version
draws the same bytes.  Both sets follow the BEIR convention: ``corpus/<id>.png``, ``queries.jsonl``
and ``qrels.tsv``.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demo.sheet import Block, Box, Chart, Pairs, Paragraph, Sheet, Style, Table, Title
from demo.words import CALIBRATION, EVALUATION, POOLS, Theme

SIZES = ((448, 576), (576, 448), (512, 384), (640, 448), (384, 512))
ACCENTS = ((38, 84, 140), (150, 52, 44), (34, 110, 70), (96, 60, 130), (70, 70, 70))
PAPERS = ((255, 255, 255), (255, 255, 255), (252, 248, 236), (240, 246, 250))
GROUP = 3
COLOURS = 48


@dataclass(frozen=True)
class PageSet:
    """What one set is drawn from.

    Attributes
    ----------
    name : str
        Folder name, also the start of the ids.
    seed : int
        Seed of every choice.
    themes : tuple of Theme
        Kinds of documents.
    half : int
        0 for the even entries of every pool, 1 for the odd ones.
    groups : int
        Groups of near-duplicates, three pages each.
    queries : int
        Queries a page.
    """

    name: str
    seed: int
    themes: tuple[Theme, ...]
    half: int
    groups: int
    queries: int


SETS = (
    PageSet("evaluation", 2026, EVALUATION, 0, 42, 2),
    PageSet("calibration", 4051, CALIBRATION, 1, 16, 2),
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
    """Fills the themes of one set with values."""

    def __init__(self, plan: PageSet) -> None:
        self.plan = plan
        self.rng = random.Random(plan.seed)

    def _pool(self, name: str) -> Sequence[str]:
        pool = POOLS[name]
        # Months, weather and colours are too few to split; they stand in body text only.
        return pool if name in {"month", "weather", "colour"} else pool[self.plan.half :: 2]

    def _value(self, pool: str) -> str:
        rng = self.rng
        if pool.startswith("person"):
            return f"{rng.choice(self._pool('first'))} {rng.choice(self._pool('last'))}"
        if pool == "number":
            return str(rng.randint(11, 99))
        if pool == "code":
            return f"{rng.choice('ABCDEFGHJKLMNPRSTUVWXYZ')}{rng.randint(100, 999)}"
        if pool == "date":
            return (
                f"{rng.randint(1, 28)} {rng.choice(self._pool('month'))} {rng.randint(2019, 2030)}"
            )
        return rng.choice(self._pool(pool))

    def _style(self) -> Style:
        rng = self.rng
        return Style(
            size=rng.choice((12.0, 13.0, 14.0, 14.0, 15.0, 16.0, 17.0)),
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
        items = rng.sample(list(self._pool(theme.items)), rng.randint(3, 5))
        facts |= {"place": place, "item": items[0], "item2": items[1]}
        pairs = Pairs([(key, facts[key.lower()]) for key, _ in theme.fields])
        rows = [[i, *(str(rng.randint(12, 980)) for _ in theme.columns[1:])] for i in items]
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

    def _sentence(self, line: str, facts: dict[str, str], items: Sequence[str]) -> str:
        values = {name: self._value(name) for name in ("month", "weather", "colour", "room")}
        filled = line.format(**{**values, **facts, "item": self.rng.choice(items)})
        return filled[0].upper() + filled[1:]

    def query(self, page: Page) -> tuple[str, list[str]]:
        """Return a question about the page and the values that its answer page must show."""
        question = self.rng.choice(page.theme.questions)
        values = {"room": self._value("room"), **page.facts}
        names = re.findall(r"{(\w+)}", question)
        return question.format(**values), [values[name].lower() for name in names]


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
    while len(pages) < GROUP * plan.groups:
        theme = plan.themes[len(pages) // GROUP % len(plan.themes)]
        place = writer.rng.choice(POOLS["place"][plan.half :: 2])
        title = theme.title.format(place=place)
        if title in titles:
            continue
        titles.add(title)
        style, size = writer._style(), writer.rng.choice(SIZES)
        pages += [writer.page(theme, title, place, style, size) for _ in range(GROUP)]
    folder = root / plan.name
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    names = [f"{plan.name[:4]}-{index:03d}" for index in range(len(pages))]
    for name, page in zip(names, pages, strict=True):
        page.image.save(folder / "corpus" / f"{name}.png", optimize=True)
    asked: dict[str, list[str]] = {}
    for page in pages:
        begin = len(asked)
        for _ in range(60):
            text, needs = writer.query(page)
            right = [
                n for n, p in zip(names, pages, strict=True) if all(x in p.text for x in needs)
            ]
            # A page too full to show a value leaves the question without an answer.
            if text not in asked and all(x in page.text for x in needs) and len(right) <= 2:
                asked[text] = right
            if len(asked) == begin + plan.queries:
                break
    queries, qrels = [], ["query-id\tcorpus-id\tscore"]
    for index, (text, right) in enumerate(asked.items()):
        name = f"{plan.name[:4]}-q{index:03d}"
        queries.append(json.dumps({"_id": name, "text": text}))
        qrels += [f"{name}\t{page}\t1" for page in right]
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n", "utf-8")
    (folder / "qrels.tsv").write_text("\n".join(qrels) + "\n", "utf-8")
    print(f"{plan.name}: {len(pages)} pages, {len(queries)} queries")


def main() -> None:
    """Draw both sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pages")
    options = parser.parse_args()
    for plan in SETS:
        draw_set(plan, options.out)


if __name__ == "__main__":
    main()
