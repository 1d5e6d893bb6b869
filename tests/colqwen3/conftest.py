"""The golden queries as a file of the BEIR convention."""

import json
from pathlib import Path

import pytest

GOLDEN = Path("tests/golden")


@pytest.fixture(scope="session")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return queries.jsonl with the golden queries that are not blank, in reversed order."""
    path = tmp_path_factory.mktemp("data") / "queries.jsonl"
    texts = json.loads((GOLDEN / "inputs/queries.json").read_text())
    rest = {name: text for name, text in texts.items() if text.strip()}
    lines = [json.dumps({"_id": name, "text": text}) for name, text in reversed(rest.items())]
    path.write_text("\n".join(lines) + "\n")
    return path
