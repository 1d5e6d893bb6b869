"""Pages prepared in processes: in order, bounded, with reasons, and whatever happens to a worker."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from colqwen3.dataset.pages import Page
from colqwen3.dataset.patches import Cutter, PreparedPage
from colqwen3.embedding import preparing
from colqwen3.embedding.preparing import AHEAD, prepare_ahead, prepare_page, prepare_pages
from colqwen3.system.errors import UserError

CUTTER = Cutter(16, 2, 1024, 65536, 3)


@pytest.fixture
def pages(tmp_path: Path) -> list[tuple[int, Page]]:
    """Return pages, the third of them damaged."""
    result = []
    for number in range(14):
        path = tmp_path / f"p{number}.png"
        Image.effect_noise((64 + 32 * (number % 3), 64), 50).save(path)
        result.append((number, Page(path)))
    (tmp_path / "p2.png").write_bytes((tmp_path / "p2.png").read_bytes()[:300])
    return result


def check(
    results: list[tuple[int, PreparedPage | UserError]], pages: list[tuple[int, Page]]
) -> None:
    assert [number for number, _ in results] == [number for number, _ in pages]
    for (number, result), (_, page) in zip(results, pages, strict=True):
        if number == 2:
            assert isinstance(result, UserError)
            assert "p2.png: cannot be read" in str(result)
        else:
            assert isinstance(result, PreparedPage)
            expected = prepare_page(CUTTER, page)
            assert result.grid == expected.grid
            assert np.array_equal(result.patches, expected.patches)


def test_pages_come_in_order_with_the_reason_of_a_damaged_one(
    pages: list[tuple[int, Page]],
) -> None:
    check(list(prepare_pages(pages, CUTTER, 0)), pages)
    taken = 0

    def counted() -> Iterator[tuple[int, Page]]:
        nonlocal taken
        for item in pages:
            taken += 1
            yield item

    results = []
    for done, result in enumerate(prepare_pages(counted(), CUTTER, 2)):
        assert taken - done <= 2 * AHEAD + 1  # no more are read than are soon prepared
        results.append(result)
    check(results, pages)


def test_killed_workers_cost_no_page(pages: list[tuple[int, Page]]) -> None:
    results = []
    for place, result in enumerate(prepare_pages(pages, CUTTER, 1)):
        results.append(result)
        if place in (0, 6):
            for child in children():
                os.kill(child, signal.SIGKILL)
    check(results, pages)


def children() -> list[int]:
    """Return the processes that this one has started to prepare pages."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    spawned = [
        int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert spawned
    return spawned


def test_a_page_that_ends_its_worker_is_named_and_the_others_are_prepared(
    pages: list[tuple[int, Page]], tmp_path: Path
) -> None:
    """A decoder written in C may crash on a hostile file."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from colqwen3.dataset.pages import Page\n"
        "from colqwen3.embedding import preparing\n"
        "from tests.colqwen3.embedding.test_preparing import CUTTER\n"
        "read = preparing.open_page\n"
        "def crash(page):\n"
        "    if page.path.name == 'p3.png':\n"
        "        os.abort()\n"
        "    return read(page)\n"
        "preparing.open_page = crash  # in every worker, which runs this file too\n"
        "if __name__ == '__main__':\n"
        "    pages = [(n, Page(Path(sys.argv[1]) / f'p{n}.png')) for n in range(6)]\n"
        "    for number, result in preparing.prepare_pages(pages, CUTTER, 2):\n"
        "        print(number, result if isinstance(result, Exception) else result.grid)\n"
    )
    done = subprocess.run(
        [sys.executable, program, tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())}, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in lines] == list("012345")
    assert "p3.png: ends the process that reads it" in lines[3]
    assert "p2.png: cannot be read" in lines[2]
    assert sum("(1, " in line for line in lines) == 4


def test_workers_end_with_a_parent_that_is_killed(
    pages: list[tuple[int, Page]], tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from colqwen3.dataset.pages import Page\n"
        "from colqwen3.embedding.preparing import prepare_pages\n"
        "from tests.colqwen3.embedding.test_preparing import CUTTER, children\n"
        "if __name__ == '__main__':\n"
        "    pages = ((n, Page(Path(sys.argv[1]) / f'p{n % 2}.png')) for n in range(1000))\n"
        "    prepared = prepare_pages(pages, CUTTER, 1)\n"
        "    next(prepared)\n"
        "    print(*children(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, program, tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not any(is_running(pid) for pid in workers):
            break
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_is_prepared_by_threads_keeps_its_order() -> None:
    def slow_first(number: int) -> PreparedPage:
        time.sleep(0.2 / (1 + number))
        return PreparedPage(np.full((1, 1), number, np.uint8), (1, 1, 1))

    taken = 0

    def items() -> Iterator[tuple[str, int]]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield f"p{number}", number

    for place, (name, page) in enumerate(prepare_ahead(items(), slow_first, 2)):
        assert (name, page.patches[0, 0]) == (f"p{place}", place)
        assert taken <= place + 2 * AHEAD + 2
    assert taken == 20


def test_what_fails_in_a_thread_fails_the_job() -> None:
    def fail(_: int) -> PreparedPage:
        raise UserError("b.png: is empty")

    with pytest.raises(UserError, match=r"b\.png"):
        list(prepare_ahead([("b", 1)], fail, 1))


def test_any_error_of_a_decoder_is_a_reason() -> None:
    future: Future[PreparedPage] = Future()
    future.set_exception(IndexError("list index out of range\nmore"))
    result = preparing._result(future.result, Page(Path("a.pdf"), 3))
    assert str(result) == (
        "a.pdf#page=3: cannot be read (IndexError: list index out of range); replace or remove the page"
    )
