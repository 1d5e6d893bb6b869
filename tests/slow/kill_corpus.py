"""Kill `colqwen3 embed-corpus` again and again until it is through, and compare every byte.

    python -m tests.slow.kill_corpus --model DIR --pages 10000 --out FILE.json

Pages are drawn, every 3001st of them damaged. One run is left alone; the other is killed, workers and
all, when its folder holds an eighth, three eighths and six eighths of the shards, each next run going
on from there. Both must end with status 1, for the damaged pages, and hold the same files.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from colqwen3.system.files import write_json
from demo.benchmarks.measure import machine

ROOT = Path(__file__).parents[2]
PIXELS = (480, 640)
PAGES_OF_SHARD = 64
DAMAGED = 3001  # one page of so many
EIGHTHS = (1, 3, 6)


def draw(folder: Path, number: int) -> None:
    """Write a page of the demo, enlarged, with its number; or the first bytes of one."""
    sources = sorted((ROOT / "demo/pages/evaluation/corpus").glob("*.png"))
    with Image.open(sources[number % len(sources)]) as source:
        page = source.convert("RGB").resize(PIXELS)
    ImageDraw.Draw(page).text((8, 4), f"page {number}", "red")
    path = folder / f"{number // 1000:03d}" / f"page-{number:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, compress_level=1)
    if number % DAMAGED == DAMAGED - 1:
        path.write_bytes(path.read_bytes()[:3000])


def embed(command: Sequence[str | Path], out: Path, kill_at: Sequence[int]) -> dict[str, Any]:
    """Run a command that fills `out` until it is through, killed at so many shards before."""
    start, runs = time.monotonic(), []
    for shards in (*kill_at, None):
        with (out.parent / f"{out.name}.log").open("a") as log:
            process = subprocess.Popen(
                [*command, "--out", out], stdout=log, stderr=log, start_new_session=True
            )
            while process.poll() is None:
                time.sleep(0.1)
                if shards is not None and len(list(out.glob("*.parquet"))) >= shards:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        runs.append({
            "killed_at_shards": shards,
            "status": process.returncode,
            "shards": len(list(out.glob("*.parquet"))),
            "seconds_since_start": round(time.monotonic() - start, 1),
        })  # fmt: skip
        print(out.name, runs[-1], flush=True)
    return {"seconds": round(time.monotonic() - start, 1), "runs": runs}


def main() -> None:
    """Draw, embed twice, compare; the status is 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.kill_corpus", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model", metavar="DIR")
    parser.add_argument("--weights", default="random, true shapes", help="words for the results")
    parser.add_argument("--pages", type=int, default=10_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    shards = -(-args.pages // PAGES_OF_SHARD)
    if shards < 8:
        parser.error(
            f"--pages must be more than {7 * PAGES_OF_SHARD}: each kill needs shards of its own"
        )
    work = Path(tempfile.mkdtemp(prefix="kill-corpus-"))
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, [work / "pages"] * args.pages, range(args.pages), chunksize=64))
    command = [
        sys.executable, "-m", "colqwen3", "embed-corpus", work / "pages", "--model", args.model,
        "--device", args.device, "--workers", str(args.workers),
        "--pages-per-shard", str(PAGES_OF_SHARD),
    ]  # fmt: skip
    outs = {"undisturbed": work / "undisturbed", "killed": work / "killed"}
    moments = [shards * eighths // 8 for eighths in EIGHTHS]
    results: dict[str, Any] = {
        "machine": machine(args.device == "cuda"), "weights": args.weights,
        "pages": args.pages, "damaged": args.pages // DAMAGED, "pixels": PIXELS, "shards": shards,
        **{name: embed(command, out, moments if name == "killed" else []) for name, out in outs.items()},
    }  # fmt: skip
    files = {
        name: {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        for name, out in outs.items()
    }
    names = files["undisturbed"].keys() | files["killed"].keys()
    results["differing_files"] = sorted(
        name for name in names if files["undisturbed"].get(name) != files["killed"].get(name)
    )
    statuses = [results[name]["runs"][-1]["status"] for name in outs]
    all_killed = all(run["status"] == -signal.SIGKILL for run in results["killed"]["runs"][:-1])
    complete = len(list(outs["killed"].glob("*.parquet"))) == shards
    results["passed"] = not results["differing_files"] and complete and all_killed and (
        statuses == [bool(results["damaged"])] * 2
    )  # fmt: skip
    if args.out:
        write_json(args.out, results)
    print(json.dumps(results, indent=2))
    if not results["passed"]:
        sys.exit(f"failed; see {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
