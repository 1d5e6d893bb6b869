"""Progress of long work with rate and time left: a bar on a terminal, else a line per tenth or minute."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
MINUTE = 60.0
logger = logging.getLogger(__name__)


class Progress:
    """Counts items of work; use as a context manager and call `advance`.

    Parameters
    ----------
    what
        The items, in the plural.
    total
        How many there are.
    done
        How many an earlier run has done already.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self._before, self._start = done, time.monotonic()
        self._said = self._start
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=what, unit=f" {what}", disable=hidden)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, items: int = 1) -> None:
        """Count `items` as done."""
        before, self.done = self.done, self.done + items
        self.bar.update(items)
        total, now = max(self.total, 1), time.monotonic()
        tenth = before * 10 // total != self.done * 10 // total
        if self.bar.disable and (tenth or now - self._said >= MINUTE):
            self._said = now
            logger.info("%s: %d of %d%s", self.what, self.done, self.total, self._time_left(now))

    def _time_left(self, now: float) -> str:
        left, done, taken = self.total - self.done, self.done - self._before, now - self._start
        if left <= 0 or done <= 0:
            return ""
        rate = f" at {done / taken:.3g} per second" if taken > 0 else ""
        return f", about {tqdm.format_interval(taken / done * left)} left{rate}"


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield `items`, counting each as done when the next is asked for."""
    with Progress(what, total) as progress:
        for item in items:
            yield item
            progress.advance()
