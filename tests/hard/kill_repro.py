"""Kill `dvc repro` at moments spread over a run, run it again, and compare every byte.

    python -m tests.hard.kill_repro --moments 20

Each moment has a fresh clone of a small setting. SIGKILL and SIGTERM go to dvc alone, in turn, and
the next `dvc repro` starts at once, so that a stage left behind would get in its way.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.clone import differences, dvc, results, small_clone, start_dvc


def processes_of(clone: Path) -> list[int]:
    """Return the processes whose working folder is the clone."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == clone.resolve():
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found


def kill_at(clone: Path, seconds: float, sign: signal.Signals) -> tuple[str, int]:
    """Kill dvc so many seconds after its start; return the stage and how many it left behind."""
    with (clone / ".log").open("w") as log:
        process = start_dvc(clone, "repro", log=log)
        time.sleep(seconds)
        process.send_signal(sign)
        process.wait()
    running = [line for line in (clone / ".log").read_text().splitlines() if "Running" in line]
    return (running or ["before the first stage"])[-1], len(processes_of(clone))


def main() -> None:
    """Print a line a moment; exit with status 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.hard.kill_repro", description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    moments = parser.parse_args().moments
    work = Path(tempfile.mkdtemp(prefix="kill-"))
    calm = small_clone(work / "calm")
    start = time.monotonic()
    done = dvc(calm, "repro")
    whole = time.monotonic() - start
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    wanted, failed = results(calm), 0
    print(f"undisturbed: {whole:.0f} s, {len(wanted)} results", flush=True)
    for moment in range(moments):
        seconds = whole * (moment + 0.5) / moments
        sign = (signal.SIGKILL, signal.SIGTERM)[moment % 2]
        clone = small_clone(work / f"killed-{moment}")
        at, left = kill_at(clone, seconds, sign)
        again = dvc(clone, "repro")
        differing = differences(results(clone), wanted) if again.returncode == 0 else []
        orphans = processes_of(clone)
        bad = bool(again.returncode or differing or orphans)
        failed += bad
        print(
            f"{sign.name} after {seconds:.1f} s ({at}): {left} left behind; next repro: status "
            f"{again.returncode}, {len(differing)} results differ, {len(orphans)} still running",
            flush=True,
        )
        if bad:
            print(again.stdout, again.stderr, differing, orphans)
        else:
            shutil.rmtree(clone)
    print(f"{moments} moments, {failed} failed")
    if not failed:
        shutil.rmtree(work)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
