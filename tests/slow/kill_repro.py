"""Kill `dvc repro` again and again until it is through, and compare every byte of the results.

    python -m tests.slow.kill_repro --moments 20

SIGKILL and SIGTERM go to dvc alone, in turn, at moments spread over the run of a small setting.
Each next `dvc repro` starts at once, so that a stage left behind would get in its way, and goes on
from what the last one left. The one after the last moment must end well.
"""

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.clone import differences, dvc, processes_of, results, small_clone, start_dvc

# what DVC writes in place, and what it says of the half that a kill leaves
IN_PLACE = {
    "dvc.lock": "'./dvc.lock' validation failed",
    ".dvc/tmp/rwlock": "Unable to read RWLock-file",
}


def remove_half_written(clone: Path, said: str) -> bool:
    """Do what README.md, Troubleshooting, tells; return whether it was called for."""
    for name, words in IN_PLACE.items():
        if words in said:
            print(f"{name} was half written when DVC was killed: removed", flush=True)
            (clone / name).unlink()
            return True
    return False


def kill_after(clone: Path, seconds: float, sign: signal.Signals) -> str | None:
    """Kill dvc so many seconds after its start; return the stage it was at, None if it had ended."""
    log = clone / ".log"
    with log.open("w") as file:
        process = start_dvc(clone, "repro", log=file)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(sign)
        process.wait()
    stages = re.findall("Running stage '(.*)'", log.read_text())
    if process.returncode == -sign:
        return stages[-1] if stages else "none yet"
    if process.returncode and remove_half_written(clone, log.read_text()):
        return "none yet"
    if process.returncode:
        sys.exit(log.read_text())
    return None


def main() -> None:
    """Print a line a moment; exit with status 1 if anything differs or still runs."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.kill_repro", description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    moments = parser.parse_args().moments
    work = Path(tempfile.mkdtemp(prefix="kill-"))
    calm, killed = small_clone(work / "calm"), small_clone(work / "killed")
    start = time.monotonic()
    done = dvc(calm, "repro")
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    expected = results(calm)
    whole = time.monotonic() - start
    print(f"undisturbed: {whole:.0f} s, {len(expected)} results", flush=True)
    draw, count = random.Random(1), 0
    while count < moments:
        # a stage takes seconds: most moments are too early for it to end, some are not
        seconds = draw.uniform(0.01, 0.2) * whole
        sign = (signal.SIGKILL, signal.SIGTERM)[count % 2]
        at = kill_after(killed, seconds, sign)
        if at is None:  # through: once more from the start
            print(f"through after {count} moments", flush=True)
            if differing := differences(results(killed), expected):
                sys.exit(f"differ: {differing}")
            shutil.rmtree(killed)
            small_clone(killed)
            continue
        count += 1
        left = len(processes_of(killed))
        print(f"{sign.name} after {seconds:.1f} s at {at}: {left} left behind", flush=True)
    done = dvc(killed, "repro")
    while remove_half_written(killed, done.stdout + done.stderr):
        done = dvc(killed, "repro")
    time.sleep(3)
    differing = differences(results(killed), expected) if done.returncode == 0 else []
    running = processes_of(killed)
    print(
        f"after {moments} moments: status {done.returncode}, {len(differing)} of {len(expected)} "
        f"results differ, {len(running)} processes still run"
    )
    if done.returncode or differing or running:
        sys.exit(f"{done.stdout}{done.stderr}{differing}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
