"""The search page in a headless browser: a real query, both models, and text that stays text."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="not in this environment: make test-corpus")
sync_api = pytest.importorskip("playwright.sync_api", reason="not in this environment")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

ROOT = Path(__file__).parents[3]
CORPUS = ROOT / "demo/pages/evaluation/corpus"
MODEL = str(ROOT / "demo/model")
ODD = "**bold** <i>x<i> $y$.png"  # would be markup, were it not shown as text


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with eight pages of the demo, their vectors, and two queries."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "in").mkdir()
    for path in sorted(CORPUS.glob("*.png"))[:7]:
        shutil.copy(path, folder / "in")
    shutil.copy(CORPUS / "eval-051.png", folder / "in" / ODD)
    (folder / "queries.jsonl").write_text('{"_id": "a", "text": "bottle filler"}\n')
    words = ["embed-corpus", "--model", MODEL, "in", "--out", "vectors"]
    done = subprocess.run(
        [sys.executable, "-m", "colqwen3", *words], cwd=folder, env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def port(vectors: Path) -> Iterator[int]:
    """Serve the page; return its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = ["search", "--original", MODEL, "vectors", "--quantized", MODEL, "vectors"]
    words += ["--queries", "queries.jsonl", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "colqwen3", *words], cwd=vectors, env=environment()
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1)
                break
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait()


def test_a_query_shows_pages_of_both_models_and_markup_stays_text(port: int) -> None:
    listening = {row[1] for row in _listening() if row[1].endswith(f":{port:04X}")}
    assert listening == {f"0100007F:{port:04X}"}, "not the loopback address alone"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        box = page.get_by_label("Query")
        box.wait_for(timeout=120_000)
        box.fill("Thornby workshop log <script>alert(1)</script>")
        box.press("Enter")
        page.get_by_text("queries", exact=False).last.wait_for(timeout=120_000)
        page.get_by_text("MaxSim").nth(5).wait_for(timeout=120_000)
        first = page.get_by_text("MaxSim").all_inner_texts()
        assert len(first) == 6  # three pages by each model
        assert first[0].startswith(f"1. in/{ODD}\nMaxSim ")
        assert first[0] == first[3]  # the same model on both sides
        assert page.locator("img").count() == 6
        for markup in ("i", "strong", "script:text('alert')", ".katex"):
            assert page.locator(f"[data-testid=stText] {markup}").count() == 0
        assert "0 queries" in page.inner_text("body")
        browser.close()


def _listening() -> list[list[str]]:
    """Return the rows of sockets that listen, over IPv4 and IPv6."""
    rows = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
            rows += [fields for line in lines if (fields := line.split())[3] == "0A"]
    return rows
