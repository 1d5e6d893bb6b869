"""Embed thousands of pages: does memory stay flat, and does a killed run go on where it was.

    python -m tests.slow.long_embed --pages 2000

The demo's pages, again and again under other names, through the command; Linux only.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path("demo/pages/evaluation/corpus")
WARM = 0.2  # of the pages: until then libraries and caches fill up


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has for itself."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    actual = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(actual[1]) * 1024 if actual else 0


def command(pages: Path, out: Path) -> list[str]:
    """Return the command that embeds a folder with the demo's model."""
    options = ["--model", "demo/model", "--pages", str(pages), "--out", str(out)]
    return [sys.executable, "-m", "stages.embed", *options]


def stored(out: Path) -> int:
    """Return how many parts an unfinished run has stored."""
    try:
        state = json.loads((out.with_name(out.name + ".parts") / "state.json").read_text())
    except OSError:
        return 0
    return len(state["files"])


def main() -> None:
    """Print memory as it goes, and what a killed run did again."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.long_embed", description=__doc__)
    parser.add_argument("--pages", type=int, default=2000)
    count = parser.parse_args().pages
    work = Path(tempfile.mkdtemp(prefix="long-"))
    pages, out = work / "pages", work / "calm.safetensors"
    pages.mkdir()
    originals = sorted(SOURCE.iterdir())
    for number in range(count):
        original = originals[number % len(originals)]
        shutil.copyfile(original, pages / f"{number:05d}{original.suffix}")
    start = time.monotonic()
    process = subprocess.Popen(command(pages, out), stderr=subprocess.DEVNULL)
    seen: list[tuple[int, int]] = []
    while process.poll() is None:
        seen.append((stored(out), resident(process.pid)))
        time.sleep(1)
    parts = max(done for done, _ in seen)
    warm = max(size for done, size in seen if done <= WARM * parts)
    later = max(size for done, size in seen if done > WARM * parts)
    print(
        f"{count} pages in {time.monotonic() - start:.0f} s, {parts} parts; own memory at most "
        f"{warm / 1e6:.1f} MB in the first {WARM:.0%}, {later / 1e6:.1f} MB after: "
        f"{100 * (later / warm - 1):+.1f} %",
        flush=True,
    )
    again = work / "killed.safetensors"
    process = subprocess.Popen(command(pages, again), stderr=subprocess.DEVNULL)
    while stored(again) < parts // 2:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    remaining = stored(again)
    done = subprocess.run(command(pages, again), capture_output=True, text=True, check=True)
    said = re.search(r"going on: (\d+) of (\d+) are embedded", done.stderr)
    same = again.read_bytes() == out.read_bytes()
    left = sorted(os.listdir(work))
    print(
        f"killed after part {remaining}; then: {said and said[0]}; same bytes: {same}; files: {left}"
    )
    shutil.rmtree(work)
    sys.exit(not (same and said and later <= 1.05 * warm))


if __name__ == "__main__":
    main()
