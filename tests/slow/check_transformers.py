"""Check every released format in clean environments with transformers 4.57.6 and 5.x, and write the table.

    PYTHONPATH=. python tests/slow/check_transformers.py [--environments DIR]

As `check_release.py` does for one folder; the formats are released anew from one recipe. Writes
metrics/engines/transformers.json. Takes a package index, 20 GB of disk and about ten minutes.
"""

import json
import subprocess
import sys
from typing import Any

from tests.slow.check_release import (
    INPUTS,
    LEAST,
    OWNERS,
    VERSIONS,
    make_environment,
    own_embeddings,
    probe,
    worst_cosine,
)
from tests.slow.engines import FORMATS, begin, check_parser, release_as, why, write_table

CONFLICTS = {("auto_gptq", "4.57.6"): "gptqmodel 7.7 and transformers 4.57.6 exclude one another"}
"""What cannot be installed together."""
INSTEAD = {("auto_gptq", "5.24.0"): "5.23.0"}
"""optimum 2.3 and gptqmodel 7.7 were made for this one."""


def main() -> None:
    """Run the check."""
    parser = check_parser("check_transformers", __doc__)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    rows: list[dict[str, Any]] = []
    failed = False
    with begin(parser) as (args, checkpoint, work):
        expected = own_embeddings(checkpoint, INPUTS, packed=False)
        for kind in args.formats:
            folder = release_as(kind, args.recipe, work)
            for asked in args.versions:
                version = INSTEAD.get((kind, asked), asked)
                home = (args.environments or work).absolute() / f"transformers-{version}-{kind}"
                row: dict[str, Any] = {"version": version, "format": kind, "dtype": "float32"}
                row["with"] = " ".join(OWNERS[kind])
                if (kind, version) in CONFLICTS:
                    rows.append({**row, "result": f"rejected: {CONFLICTS[kind, version]}"})
                    continue
                python = make_environment(home, version, OWNERS[kind])
                try:
                    _, actual = probe(python, folder, INPUTS, work, "float32")
                except (RuntimeError, subprocess.SubprocessError) as error:
                    row["result"] = f"rejected: {why(str(error))}"
                else:
                    row["minimum"] = round(worst_cosine(actual, expected), 7)
                    row["tokens"] = sum(map(len, actual.values()))
                    row["result"] = "runs"
                    failed |= row["minimum"] < LEAST
                rows.append(row)
                print(json.dumps(row), flush=True)
        failed |= not any(row["result"] == "runs" for row in rows)
    write_table(
        "transformers", {"transformers": ", ".join(args.versions)}, rows, recipe=args.recipe
    )
    sys.exit(failed)


if __name__ == "__main__":
    main()
