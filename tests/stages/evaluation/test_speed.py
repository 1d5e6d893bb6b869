"""Timings are read for the checkpoint that they are of, and for no other."""

import json
from pathlib import Path

import pytest

from stages.evaluation.speed import checkpoint_digest, read_speed, speed_file


def test_timings_of_another_checkpoint_are_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    assert read_speed("w4", checkpoint) is None
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    assert read_speed("w4", checkpoint) is None
    digest = checkpoint_digest(checkpoint)
    path = speed_file("w4", digest)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"checkpoint": digest, "query": 1}))
    timings = read_speed("w4", checkpoint)
    assert timings is not None and timings["query"] == 1
    assert read_speed("w3", checkpoint) is None
    (checkpoint / "config.json").write_text('{"a": 1}')
    assert checkpoint_digest(checkpoint) != digest
    assert read_speed("w4", checkpoint) is None
    (checkpoint / "config.json").write_text("{}")  # going back finds them again
    assert read_speed("w4", checkpoint) == timings
