"""Check the export for colpali-engine in that library, in an environment of its own.

    PYTHONPATH=. python tests/slow/check_colpali.py [--environments DIR]

Its ColQwen3 has vectors of 320 numbers, so the demo model's 128 are filled up with zeros: cosines
stay as they are. Token pooling and similarity maps of the library run on the result. Writes
metrics/engines/colpali-engine.json. Takes a package index, 6 GB of disk and a few minutes.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file

from colqwen3.release.colpali import export_colpali
from tests.helpers.widened import widen
from tests.slow.engines import (
    ORIGINAL,
    REQUIREMENTS,
    begin,
    check_parser,
    compare,
    environment,
    make_inputs,
    pinned,
    probe,
    reference,
    write_table,
)

PINS = REQUIREMENTS / "colpali-engine.txt"
LEAST = 0.9999


def main() -> None:
    """Run the check."""
    parser = check_parser("check_colpali", __doc__)
    rows: list[dict[str, Any]] = []
    failed = False
    with begin(parser) as (args, checkpoint, work):
        inputs = make_inputs(work / "inputs")
        home = (args.environments or work / "env").absolute() / "colpali-engine"
        python = environment(home, "-r", PINS)
        for name, source in (("original", ORIGINAL), ("auto_round", checkpoint)):
            folder, out = work / f"{name}-export", work / f"{name}.safetensors"
            folder.mkdir()
            export_colpali(widen(source, work / f"{name}-wide"), folder)
            error = probe(python, "probe_colpali.py", work, folder, inputs, out)
            row: dict[str, Any] = {"format": f"{name}, exported", "dtype": "float32"}
            if error is None:
                facts = json.loads((work / "log.out").read_text().strip().splitlines()[-1])
                expected = {
                    key: torch.nn.functional.pad(vectors, (0, 192))
                    for key, vectors in reference(source, inputs, torch.float32).items()
                    if not key.endswith("_rgba")  # colpali-engine shows transparency as black
                }
                row |= compare(load_file(out), expected)
                row |= {"pooled": [facts["tokens"], facts["pooled"]], "map": facts["map"]}
                failed |= bool(facts["lost"]) or not facts["pooled"] < facts["tokens"]
                failed |= min(row["query_minimum"], row["page_minimum"]) < LEAST
            row["result"] = "runs" if error is None else f"rejected: {error}"
            failed |= error is not None
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_table("colpali-engine", pinned(PINS), rows, recipe=args.recipe)
    sys.exit(failed)


if __name__ == "__main__":
    main()
