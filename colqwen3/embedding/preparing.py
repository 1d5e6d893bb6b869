"""Preparation of pages in processes of their own: decoded, upright, resized, cut into patches.

A process imports Pillow and numpy alone and runs one thread. Some pages per process are under way
or wait, so memory stays flat however many pages there are.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from colqwen3.dataset.pages import Page, open_page
from colqwen3.dataset.patches import Cutter, PreparedPage
from colqwen3.system.errors import UserError, first_line

Key = TypeVar("Key")
Item = TypeVar("Item")
AHEAD = 4  # pages per worker that are under way or wait: 16 MB of patches


def default_workers() -> int:
    """Return a number of processes for preparation: every core but one, 32 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(32, (cores or 1) - 1))


def prepare_page(cutter: Cutter, page: Page) -> PreparedPage:
    """Read a page and cut it into patches.

    Raises
    ------
    UserError
        If it cannot be read, see `open_page`.
    """
    return cutter.cut(open_page(page))


def prepare_or_reason(cutter: Cutter, page: Page) -> PreparedPage | UserError:
    """Return a prepared page, or why it cannot be prepared."""
    return _result(lambda: prepare_page(cutter, page), page)


def prepare_pages(
    pages: Iterable[tuple[Key, Page]], cutter: Cutter, workers: int
) -> Iterator[tuple[Key, PreparedPage | UserError]]:
    """Yield prepared pages in input order, or why a page cannot be prepared.

    Parameters
    ----------
    pages
        Each with a key of the caller's; read only so far as workers are free.
    cutter
        How pages are cut.
    workers
        Number of processes, started anew (spawned); 0 prepares in this one. The program that calls
        this with processes must guard its main module as `multiprocessing` asks.
    """
    if workers == 0:
        for key, page in pages:
            yield key, prepare_or_reason(cutter, page)
        return
    pool = Pool(cutter, workers)
    try:
        waiting: deque[tuple[Key, Page, Future[PreparedPage]]] = deque()
        for key, page in pages:
            waiting.append((key, page, pool.submit(page)))
            if len(waiting) > AHEAD * workers:
                yield pool.first(waiting)
        while waiting:
            yield pool.first(waiting)
    finally:
        pool.close()


class Pool:
    """Worker processes, replaced when one of them is killed.

    Parameters
    ----------
    cutter
        How pages are cut.
    workers
        Number of processes.
    """

    def __init__(self, cutter: Cutter, workers: int) -> None:
        self._cutter, self._workers = cutter, workers
        self._executor = self._start(workers)

    def _start(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker
        )

    def submit(self, page: Page) -> "Future[PreparedPage]":
        """Have a page prepared."""
        try:
            return self._executor.submit(prepare_page, self._cutter, page)
        except BrokenProcessPool as error:
            failed: Future[PreparedPage] = Future()
            failed.set_exception(error)
            return failed

    def first(
        self, waiting: "deque[tuple[Key, Page, Future[PreparedPage]]]"
    ) -> tuple[Key, PreparedPage | UserError]:
        """Take the first of the waiting pages, once it is prepared.

        When a worker was killed, no page that was under way has a result. They are handed to new
        workers, the first of them alone: if it ends its worker again, it is at fault.
        """
        key, page, future = waiting.popleft()
        if not isinstance(_exception(future), BrokenProcessPool):
            return key, _result(future.result, page)
        self.close()
        alone = self._start(1)
        try:
            result = _result(alone.submit(prepare_page, self._cutter, page).result, page)
        finally:
            alone.shutdown()
        self._executor = self._start(self._workers)
        for index, (other, its_page, its_future) in enumerate(waiting):
            if its_future.cancelled() or isinstance(_exception(its_future), BrokenProcessPool):
                waiting[index] = other, its_page, self.submit(its_page)
        return key, result

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _exception(future: "Future[Any]") -> BaseException | None:
    return None if future.cancelled() else future.exception()


def _result(get: Callable[[], PreparedPage], page: Page) -> PreparedPage | UserError:
    """Return what `get` returns, or the reason why it raises."""
    try:
        return get()
    except UserError as error:
        return error
    except BrokenProcessPool:
        return UserError(f"{page}: ends the process that reads it; replace or remove the page")
    except Exception as error:  # a decoder may raise anything on a damaged file
        reason = f"{type(error).__name__}: {first_line(error)}"
        return UserError(f"{page}: cannot be read ({reason}); replace or remove the page")


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def prepare_ahead(
    items: Iterable[tuple[Key, Item]], prepare: Callable[[Item], PreparedPage], threads: int
) -> Iterator[tuple[Key, PreparedPage]]:
    """Yield items that are in memory already, prepared by threads, in input order.

    Whatever `prepare` raises is raised in its turn. Pillow and numpy work outside of Python's lock.
    """
    with ThreadPoolExecutor(threads) as executor:
        yield from _in_order(items, prepare, executor, AHEAD * threads)


def _in_order(
    items: Iterable[tuple[Key, Item]],
    prepare: Callable[[Item], PreparedPage],
    executor: Executor,
    ahead: int,
) -> Iterator[tuple[Key, PreparedPage]]:
    waiting: deque[tuple[Key, Future[PreparedPage]]] = deque()
    for key, item in items:
        waiting.append((key, executor.submit(prepare, item)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
