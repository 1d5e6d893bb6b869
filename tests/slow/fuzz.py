"""The properties of tests/repository/test_fuzz.py for as long as one likes, with new examples every round.

python -m tests.slow.fuzz --minutes 60
"""

import argparse
import os
import re
import subprocess
import sys
import time

EXAMPLES = 2000  # a property and round


def main() -> None:
    """Run rounds until the time is up or one fails; print the number of examples."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    end = time.monotonic() + 60 * parser.parse_args().minutes
    start, examples, rounds, code = time.monotonic(), 0, 0, 0
    while not code and time.monotonic() < end:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/repository/test_fuzz.py", "--hypothesis-show-statistics"],
            env={**os.environ, "FUZZ_EXAMPLES": str(EXAMPLES)},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        code, rounds = done.returncode, rounds + 1
        examples += sum(map(int, re.findall(r"(\d+) passing,", done.stdout)))
        minutes = (time.monotonic() - start) / 60
        print(f"{minutes:.1f} minutes, {rounds} rounds, {examples} examples", flush=True)
        if code:
            print(done.stdout, done.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
