"""Words and sentences for training pages.

The sentences come from the docstrings of a Python standard library (PSF licence), by default of
the one that runs the program, read at run time, so no text is stored here.  Made-up words follow the letter
statistics of those docstrings: they teach the model to read letters and not only known words.
"""

import ast
import random
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
ORDER = 3


@dataclass
class Corpus:
    """Text to draw from.

    Attributes
    ----------
    sentences : list of str
        Plain-letter English sentences of 4 to 30 words.
    words : list of str
        Distinct lower-case words of three letters or more, most frequent first.
    held_sentences, held_words : list of str
        Rare words that ``sentences`` and ``words`` do not contain, and the sentences with them.
    chain : dict
        The letters that follow each group of letters in ``words``, for made-up words.
    """

    sentences: list[str]
    words: list[str]
    held_sentences: list[str]
    held_words: list[str]
    chain: dict[str, list[str]] = field(default_factory=dict)


def _docstrings(root: Path) -> list[str]:
    """Return every docstring of the modules below a folder, in a fixed order."""
    texts = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                text = ast.get_docstring(node)
                if text:
                    texts.append(text)
    return texts


def harvest(seed: int, library: Path | None = None) -> Corpus:
    """Read the standard library's docstrings.

    Parameters
    ----------
    seed : int
        Decides which 3 % of the words are held out together with every sentence that uses one.
    library : Path, optional
        Folder of the standard library's modules; the running Python's by default.

    Returns
    -------
    Corpus
        Sentences, words, held-out words and the letter chain.
    """
    sentences: dict[str, None] = {}
    for text in _docstrings(library or Path(sysconfig.get_path("stdlib"))):
        for paragraph in re.split(r"\n\s*\n", text):
            if ">>>" in paragraph:
                continue
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                letters = sum(c.isalpha() or c == " " for c in sentence)
                if (
                    4 <= len(sentence.split()) <= 30
                    and sentence.isascii()
                    and letters >= 0.85 * len(sentence)
                ):
                    sentences[sentence] = None
    counts = Counter(w for s in sentences for w in re.findall(r"[a-z]{3,}", s.lower()))
    ranked = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    # Frequent words stay in: taking out "the" would take out most sentences.
    rare = ranked[600:]
    held = set(random.Random(seed).sample(rare, len(rare) // 33))
    plain: list[str] = []
    apart: list[str] = []
    for sentence in sentences:
        uses = held & set(re.findall(r"[a-z]{3,}", sentence.lower()))
        (apart if uses else plain).append(sentence)
    words = [w for w in ranked if w not in held and len(w) <= 14]
    chain: dict[str, list[str]] = {}
    for word in words:
        padded = "^" * ORDER + word + "$"
        for i in range(len(padded) - ORDER):
            chain.setdefault(padded[i : i + ORDER], []).append(padded[i + ORDER])
    return Corpus(plain, words, apart, sorted(w for w in held if len(w) <= 14), chain)


def held_out(corpus: Corpus) -> Corpus:
    """Return the part of the text that training never sees, as a corpus of its own."""
    return Corpus(corpus.held_sentences, corpus.held_words, [], [], corpus.chain)


def made_up_word(corpus: Corpus, rng: random.Random) -> str:
    """Return a word of 4 to 11 letters that follows English letter statistics."""
    while True:
        state, word = "^" * ORDER, ""
        while len(word) < 12:
            letter = rng.choice(corpus.chain[state])
            if letter == "$":
                break
            word += letter
            state = state[1:] + letter
        if 4 <= len(word) <= 11:
            return word


def number(rng: random.Random) -> str:
    """Return a number as documents print them: plain, grouped, decimal, money, date or code."""
    kind = rng.randrange(8)
    if kind <= 2:
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    if kind == 3:
        return f"{rng.randint(1, 99)},{rng.randrange(1000):03d}"
    if kind == 4:
        return f"{rng.randrange(100)}.{rng.randrange(100):02d}"
    if kind == 5:
        return f"${rng.randint(1, 999)}"
    if kind == 6:
        return f"{rng.randint(1990, 2035)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return f"{chr(65 + rng.randrange(26))}{chr(65 + rng.randrange(26))}-{rng.randrange(1000):03d}"
