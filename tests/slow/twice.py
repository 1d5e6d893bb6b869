"""`dvc repro -f` in fresh clones at different paths: which bytes differ.

python -m tests.slow.twice            the small setting, 1, 1 and 2 threads
python -m tests.slow.twice --whole    the demo as it is
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers.clone import commit, copy_tree, differences, dvc, results, small_clone


def largest_difference(first: Any, second: Any) -> float:
    """Return the largest difference of numbers at the same place of two JSON values."""
    if isinstance(first, dict):
        return max((largest_difference(first[k], second[k]) for k in first), default=0.0)
    if isinstance(first, list):
        pairs = zip(first, second, strict=True)
        return max((largest_difference(a, b) for a, b in pairs), default=0.0)
    return abs(first - second) if isinstance(first, float | int) else float(first != second)


def main() -> None:
    """Compare each clone with the first; exit with status 1 if two of as many threads differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.twice", description=__doc__)
    parser.add_argument("--whole", action="store_true", help="the demo's own params.yaml")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 1, 2])
    args = parser.parse_args()
    work, failed = Path(tempfile.mkdtemp(prefix="twice-")), False
    clones: list[tuple[Path, int]] = []
    for number, threads in enumerate(args.threads):
        clone = work / f"{'deeper/' * number}clone-{number}"
        if args.whole:
            clone.mkdir(parents=True)
            copy_tree(clone)
            commit(clone)
        else:
            small_clone(clone)
        start = time.monotonic()
        done = dvc(clone, "repro", "-f", env={"OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        print(f"{clone}: {threads} threads, {time.monotonic() - start:.0f} s", flush=True)
        clones.append((clone, threads))
    first, expected = clones[0][0], results(clones[0][0])
    for clone, threads in clones[1:]:
        differing = differences(results(clone), expected)
        failed |= bool(differing) and threads == clones[0][1]
        print(f"{clones[0][1]} and {threads} threads: {len(differing)} of {len(expected)} differ")
        for name in differing:
            size = ""
            if name.endswith(".json"):
                values = (json.loads((folder / name).read_text()) for folder in (first, clone))
                size = f" (by {largest_difference(*values):.3g} at most)"
            print(f"  {name}{size}")
    shutil.rmtree(work)
    sys.exit(failed)


if __name__ == "__main__":
    main()
