"""`colqwen3 search`: what it starts is bound to this machine, and what is missing is one line."""

import argparse
import re
import sys
from pathlib import Path

import pytest

from colqwen3.cli import build_parser
from colqwen3.commands import search
from colqwen3.system.errors import UserError


def arguments(*words: str | Path) -> argparse.Namespace:
    sides = ["--original", "m", "v", "--quantized", "n", "w"]
    return build_parser().parse_args(["search", *sides, *map(str, words)])


def test_the_page_is_served_to_this_machine_alone_and_tells_nobody() -> None:
    words = search.command(arguments("--port", "9", "--queries", "q.jsonl"))
    assert words[:4] == [sys.executable, "-m", "streamlit", "run"]
    assert Path(words[4]).name == "page.py"
    assert Path(words[4]).is_file()
    assert "--server.address=127.0.0.1" in words
    assert "--server.port=9" in words
    assert "--browser.gatherUsageStats=false" in words
    # the page reads the same options
    page = argparse.ArgumentParser()
    search.add_arguments(page)
    read = page.parse_args(words[words.index("--") + 1 :])
    assert (read.original, read.quantized) == (["m", "v"], ["n", "w"])
    assert read.queries == Path("q.jsonl")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "find_spec", lambda _: None)
    pyproject = Path("pyproject.toml").read_text()
    assert re.search(r'^search = .*"streamlit', pyproject, re.MULTILINE)
    with pytest.raises(UserError, match=r"^v: no such folder; run `colqwen3 embed-corpus` first"):
        search.execute(arguments())
    monkeypatch.chdir(tmp_path)
    for name in ("v", "w"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"^q\.jsonl: no such file"):
        search.execute(arguments("--queries", "q.jsonl"))
    with pytest.raises(UserError, match=r"^streamlit is not installed; .*\.\[search\]"):
        search.execute(arguments())
    monkeypatch.setattr(search, "find_spec", lambda _: True)
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words))
    search.execute(arguments())
    assert started == [search.command(arguments())]
