"""Progress of long work: a bar on a terminal, a line per tenth otherwise."""

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Progress:
    """Counts items of work; use as a context manager and call `advance`."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, unit=f" {what}", disable=hidden)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, items: int = 1) -> None:
        """Count `items` as done."""
        before, self.done = self.done, self.done + items
        self.bar.update(items)
        if self.bar.disable and before * 10 // max(self.total, 1) != self.done * 10 // max(
            self.total, 1
        ):
            logger.info("%s: %d of %d", self.what, self.done, self.total)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield `items`, counting each as done when the next is asked for."""
    with Progress(what, total) as progress:
        for item in items:
            yield item
            progress.advance()
