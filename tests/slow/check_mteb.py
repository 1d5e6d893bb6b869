"""Let mteb's own ColQwen3 wrapper, and sentence-transformers through mteb, finish a task on a release.

    PYTHONPATH=. python tests/slow/check_mteb.py [--environments DIR]

In an environment of its own, offline, on the demo pages; nDCG@5 must equal that of `evaluate`
(metrics/quality/<recipe>.json). Writes metrics/engines/mteb.json. Takes a package index, 6 GB of
disk and about five minutes.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.slow.engines import (
    DATASET,
    REQUIREMENTS,
    ROOT,
    check_parser,
    environment,
    pinned,
    probe,
    release_as,
    write_table,
)

PINS = REQUIREMENTS / "mteb.txt"
ROUTES = ("ColQwen3Wrapper", "MultiVectorWrapper")
NEAR = 2e-4
"""mteb rounds to five digits, and the kernel of packed weights rounds as it computes."""


def main() -> None:
    """Run the check."""
    parser = check_parser("check_mteb", __doc__)
    args = parser.parse_args()
    quality = json.loads((ROOT / f"metrics/quality/{args.recipe}.json").read_text())
    expected = quality["retrieval"]["ndcg_at_5"]["quantized"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = release_as("auto_round", args.recipe, work)
        python = environment((args.environments or work / "env").absolute() / "mteb", "-r", PINS)
        for route in ROUTES:
            error = probe(python, "probe_mteb.py", work, folder, DATASET, route)
            row: dict[str, Any] = {"route": route, "format": "auto_round", "dtype": "float32"}
            if error is None:
                figures = json.loads((work / "log.out").read_text().strip().splitlines()[-1])
                row |= {**figures, "ndcg_at_5_of_evaluate": expected}
            row["result"] = "runs" if error is None else f"rejected: {error}"
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_table("mteb", pinned(PINS), rows, recipe=args.recipe)
    sys.exit(any(abs(row.get("ndcg_at_5", 9) - expected) > NEAR for row in rows))


if __name__ == "__main__":
    main()
