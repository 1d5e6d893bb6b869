"""Formats of vectors against what they are said to keep, and against plain arithmetic."""

import sys

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from colqwen3.commands import embed_corpus
from colqwen3.corpus.formats import FORMATS, decode, encode
from colqwen3.system.errors import UserError


def unit(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(tokens, width, generator=generator), dim=-1)


def test_the_command_offers_every_format() -> None:
    assert tuple(FORMATS) == embed_corpus.FORMATS


@pytest.mark.parametrize(
    ("name", "bytes_", "error"),
    [
        ("float32", 40 * 64 * 4, 0),
        ("float16", 40 * 64 * 2, 2**-11),  # of values below 1
        ("int8", 40 * 64 + 40 * 2, 0.6 / 127),  # half a step of a scale of at most 1 / 127
    ],
)
def test_unpooled_formats_keep_every_number_nearly(name: str, bytes_: int, error: float) -> None:
    vectors = unit(40, 64)
    vectors[3] = torch.eye(64)[5]  # the largest scale
    encoded = encode(vectors, FORMATS[name])
    assert encoded.bytes == bytes_
    decoded = decode(encoded, FORMATS[name].kind)
    assert decoded.dtype == torch.float32
    assert float((decoded - vectors).abs().max()) <= error
    if name == "int8":
        assert encoded.scales is not None
        # each vector by its own largest value, which is exact but for the scale's 16 bits
        step = vectors.abs().amax(1, keepdim=True) / 127
        assert ((decoded - vectors).abs() <= 0.5 * step + 127 * step * 2**-11).all()
        assert set(np.abs(encoded.values.astype(int)).max(1)) <= {126, 127}


def test_binary_keeps_the_signs() -> None:
    vectors = unit(7, 16)
    encoded = encode(vectors, FORMATS["binary"])
    assert encoded.bytes == 7 * 2
    for row, stored in zip(vectors.tolist(), encoded.values.tolist(), strict=True):
        text = "".join(f"{byte:08b}" for byte in stored)
        assert text == "".join("1" if value > 0 else "0" for value in row)
    decoded = decode(encoded, "binary")
    assert torch.equal(decoded.sign(), torch.where(vectors > 0, 1.0, -1.0))
    torch.testing.assert_close(decoded.norm(dim=1), torch.ones(7))
    with pytest.raises(UserError, match="by eights, not 12"):
        encode(unit(3, 12), FORMATS["binary"])


def test_pooling_gives_means_of_ward_clusters() -> None:
    """Against scipy alone: the same clusters, as sets, and their means."""
    centres = torch.eye(16)[:6]
    vectors = torch.nn.functional.normalize(
        centres.repeat_interleave(3, 0) + 0.05 * unit(18, 16), dim=-1
    )
    encoded = encode(vectors, FORMATS["pool3-float16"])
    tree = linkage(pdist(vectors.numpy(), "cosine"), "ward")
    labels = fcluster(tree, 6, "maxclust")
    expected = sorted(
        torch.nn.functional.normalize(vectors[labels == label].mean(0), dim=0).tolist()
        for label in set(labels)
    )
    actual = sorted(decode(encoded, "float16").tolist())
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    assert len(encode(vectors, FORMATS["pool2-int8"]).values) == 9


def test_vectors_that_are_not_finite_are_rejected() -> None:
    vectors = unit(3, 8)
    vectors[1, 2] = torch.nan
    for format_ in FORMATS.values():
        with pytest.raises(UserError, match="NaN or infinite"):
            encode(vectors, format_)


def test_a_zero_vector_stays_zero() -> None:
    assert not decode(encode(torch.zeros(2, 8), FORMATS["int8"]), "int8").any()


def test_pooling_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sentence_transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="pip install 'sentence-transformers"):
        encode(unit(4, 8), FORMATS["pool2-float16"])
