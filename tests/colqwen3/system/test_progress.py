"""Progress: a line per tenth or minute in a log, a bar on a terminal."""

import io
import logging

import pytest

from colqwen3.system.progress import Progress, track


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="colqwen3.system.progress")
    return caplog


def counts(log: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines without the time that is left."""
    return [line.split(", about ")[0] for line in log.messages]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_items_pass_through_in_order() -> None:
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert list(track([], "nothing", 0)) == []


@pytest.mark.parametrize("total", [10, 25, 1000])
def test_log_has_a_line_per_tenth(log: pytest.LogCaptureFixture, total: int) -> None:
    list(track(range(total), "pages", total))
    done = [int(line.split()[1]) for line in log.messages]
    assert [line.split(": ")[0] for line in log.messages] == ["pages"] * 10
    assert log.messages[-1] == f"pages: {total} of {total}"
    for tenth, count in enumerate(done, 1):
        assert 0 <= count * 10 - tenth * total < 10


def test_few_items_have_a_line_each(log: pytest.LogCaptureFixture) -> None:
    list(track("abc", "pages", 3))
    assert counts(log) == ["pages: 1 of 3", "pages: 2 of 3", "pages: 3 of 3"]


def test_an_item_counts_when_it_is_done(log: pytest.LogCaptureFixture) -> None:
    items = track("ab", "pages", 2)
    next(items)
    assert log.messages == []
    next(items)
    assert counts(log) == ["pages: 1 of 2"]


def test_several_items_count_at_once(log: pytest.LogCaptureFixture) -> None:
    with Progress("pages", 100) as progress:
        for items in (5, 4, 30, 1, 60):
            progress.advance(items)
    assert counts(log) == ["pages: 39 of 100", "pages: 40 of 100", "pages: 100 of 100"]
    assert progress.done == 100


def test_the_time_left_counts_only_what_this_run_has_done(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 of 100 were done before; 10 more took 30 s, so 30 more take 90 s."""
    clock = iter([1000.0, 1030.0, 1120.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Progress("pages", 100, done=60) as progress:
        progress.advance(10)
        progress.advance(30)
    assert log.messages == [
        "pages: 70 of 100, about 01:30 left at 0.333 per second",
        "pages: 100 of 100",
    ]


def test_long_work_has_a_line_per_minute(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 40.0, 70.0, 100.0, 131.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Progress("pages", 10_000) as progress:
        for _ in range(4):
            progress.advance()
    assert counts(log) == ["pages: 2 of 10000", "pages: 4 of 10000"]


def test_terminal_shows_a_bar_and_no_lines(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    list(track(range(20), "pages", 20))
    assert "pages" in terminal.getvalue()
    assert "20/20" in terminal.getvalue()
    assert log.messages == []


def test_no_terminal_shows_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    list(track(range(20), "pages", 20))
    out, err = capfd.readouterr()
    assert "\r" not in out + err


def test_bar_is_closed_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with pytest.raises(KeyError), Progress("pages", 4) as progress:
        progress.advance()
        raise KeyError
    assert terminal.getvalue().endswith("\n")
