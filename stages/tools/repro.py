"""Run the pipeline to its end and show what came out: what `make repro` does.

One recipe that fails does not stop the others (`dvc repro --keep-going`); Ctrl-C stops everything,
which DVC alone, told to keep going, would not.
"""

import argparse
import subprocess
import sys

from colqwen3.system.errors import INTERRUPTED, UserError, run
from stages.checking.params import Params
from stages.pipeline.params import load_params
from stages.tools.results import describe

STOP_SECONDS = 10.0
"""What DVC gets to end after Ctrl-C; a stage ends by itself once its DVC is gone."""


def repro(options: list[str]) -> int:
    """Run ``dvc repro --keep-going`` with more options; return its exit status.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl-C, once DVC has ended.
    UserError
        If DVC is not installed.
    """
    try:
        process = subprocess.Popen(["dvc", "repro", "--keep-going", *options])
    except FileNotFoundError:
        raise UserError("dvc: no such command; run `make setup`, then `make repro`") from None
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def main() -> None:
    """Run the pipeline, show its results, and exit with DVC's status."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.tools.repro",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options = parser.parse_known_args()[1]
    params = load_params(Params)  # a mistake shows now, whatever DVC thinks has changed
    try:
        status = repro(options)
    except KeyboardInterrupt:
        print("error: interrupted; run `make repro` again to continue", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if status:
        print("\nSome stages failed, see above. These are the results that there are:\n")
    try:
        print("\n".join(describe(params)))
    except UserError as error:
        if not status:
            raise
        print(f"no table of results: {error}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    run(main)
