"""A parity oracle of the golden model, from vectors that the publisher's own code recorded."""

import json
from pathlib import Path

from safetensors.torch import load_file

from colqwen3.release.oracle import Oracle
from tests.helpers.golden import STEMS

GOLDEN = Path("tests/golden")
META = json.loads((GOLDEN / "golden_meta.json").read_text())["pages"]
WHOLE = [stem for stem in STEMS if META[stem].get("rows") is None]
"""Pages of which every token was recorded."""


def recorded() -> Oracle:
    """Scores computed here, by the definition, from the publisher's recorded vectors."""
    vectors = load_file(GOLDEN / "golden.safetensors")
    queries = json.loads((GOLDEN / "inputs/queries.json").read_text(encoding="utf-8"))
    scores = tuple(
        tuple(
            float((vectors[f"query/{name}"] @ vectors[f"page/{stem}"].T).amax(1).sum())
            for stem in WHOLE
        )
        for name in queries
    )
    sizes = json.loads((GOLDEN / "model/config.json").read_text())["text_config"]
    return Oracle(
        model="the golden model",
        sizes={"hidden_size": sizes["hidden_size"]},
        queries=tuple(queries.values()),
        pages=tuple(f"{stem}.png" for stem in WHOLE),
        scores=scores,
        tolerance=1e-3,
    )
