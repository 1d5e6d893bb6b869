"""Parts of embeddings: stored as they come, read again after a crash, joined byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from colqwen3.embedding import parts as module
from colqwen3.embedding.parts import Parts
from colqwen3.embedding.store import write_embeddings
from colqwen3.system.resume import Scratch


def items(count: int, start: int = 0) -> dict[str, torch.Tensor]:
    return {
        f"é{n}": torch.randn(1 + n % 3, 4, generator=torch.Generator().manual_seed(n))
        for n in range(start, start + count)
    }


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_ITEMS", 3)


def test_the_file_equals_the_librarys(tmp_path: Path) -> None:
    queries, pages = items(4), items(8)
    with Scratch(tmp_path / "w", "key") as scratch:
        parts = Parts(scratch)
        for name, tensor in queries.items():
            parts.add("query", {name: tensor})
        parts.add("page", pages)
        parts.flush()
        out = tmp_path / "out.safetensors"
        # in another order than they came
        names = sorted(pages, reverse=True)
        write_embeddings(out, parts.of("query", queries), parts.of("page", names))
        assert len(scratch.files) > 1
    expected = {f"query/{n}": t for n, t in queries.items()}
    expected |= {f"page/{n}": pages[n] for n in pages}
    actual = out.read_bytes()
    metadata = {"order": json.dumps({"queries": list(queries), "pages": names})}
    save_file(expected, tmp_path / "expected", metadata=metadata)
    assert actual == (tmp_path / "expected").read_bytes()


def test_what_was_stored_is_found_again_and_the_rest_is_not(tmp_path: Path) -> None:
    with Scratch(tmp_path / "w", "key") as scratch:
        parts = Parts(scratch)
        parts.add("page", items(2))
        parts.add("page", items(2, 2))  # four: stored
        parts.add("page", items(1, 4))  # still in memory
    with Scratch(tmp_path / "w", "key") as scratch:
        parts = Parts(scratch)
        assert [f"page/é{n}" in parts for n in range(5)] == [True] * 4 + [False]
        assert "query/é0" not in parts
        for name, tensor in items(4).items():
            assert torch.equal(parts.of("page", [name])[name], tensor)
        parts.add("page", items(1, 4))
        parts.flush()
        assert len(parts.of("page", items(5))) == 5


def test_a_damaged_part_is_not_used(tmp_path: Path) -> None:
    with Scratch(tmp_path / "w", "key") as scratch:
        Parts(scratch).add("page", items(3))
        (name,) = scratch.files
    path = tmp_path / "w" / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with Scratch(tmp_path / "w", "key") as scratch:
        assert "page/é0" not in Parts(scratch)
