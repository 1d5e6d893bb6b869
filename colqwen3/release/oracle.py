"""A parity oracle: MaxSim scores of public pages and queries, which a model has to reproduce.

The scores are those of a public test of sentence-transformers for its multi-vector encoder with
TomoroAI/tomoro-colqwen3-embed-4b in float32, to be met to within 0.001.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colqwen3.dataset.pages import Page, open_page
from colqwen3.model.scoring import max_sim
from colqwen3.system.errors import UserError, first_line
from colqwen3.system.files import path_is

DATASET = "sentence-transformers/example-documents"
REVISION = "49f05727417edee37938141fd1dd6ad70cbcc559"


@dataclass(frozen=True)
class Oracle:
    """Queries, pages, and the scores that a model gives them.

    Attributes
    ----------
    model
        Whose scores they are.
    sizes
        Keys of ``text_config`` that tell that model from others, and their values.
    queries
        Texts.
    pages
        File names.
    scores
        MaxSim, a row for each query with a number for each page.
    tolerance
        The most that a score may differ in float32.
    """

    model: str
    sizes: dict[str, int]
    queries: tuple[str, ...]
    pages: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    tolerance: float


TOMORO_4B = Oracle(
    model="TomoroAI/tomoro-colqwen3-embed-4b",
    sizes={"hidden_size": 2560, "num_hidden_layers": 36},
    queries=(
        "What is the variable represented on the y-axis of the graph?",
        "Total outlay is maximum in which year?",
    ),
    pages=("doc1.jpg", "doc2.jpg", "doc3.jpg", "doc4.jpg"),
    scores=((12.74590, 8.98804, 6.31755, 5.91395), (4.58117, 10.76462, 4.75141, 5.33277)),
    tolerance=1e-3,
)


def find_pages(oracle: Oracle, folder: Path | None) -> list[Path]:
    """Return the files of the oracle's pages, in `folder` or else from the Hub.

    Raises
    ------
    UserError
        If one is missing, or the Hub cannot provide it.
    """
    if folder is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(
                snapshot_download(
                    DATASET, repo_type="dataset", revision=REVISION,
                    allow_patterns=[f"**{page}" for page in oracle.pages],
                )
            )  # fmt: skip
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"{DATASET}: the Hub cannot provide the pages ({first_line(error)}); fetch "
                f"{', '.join(oracle.pages)} at revision {REVISION} and give their folder as --pages"
            ) from None
    found = []
    for page in oracle.pages:
        paths = sorted(folder.rglob(page)) if path_is(folder, Path.is_dir) else []
        if len(paths) != 1:
            raise UserError(
                f"{folder / page}: {'is there twice' if paths else 'no such file'}; give the folder of "
                f"{', '.join(oracle.pages)} as --pages"
            )
        found += paths
    return found


def check_model(oracle: Oracle, config: dict[str, Any]) -> None:
    """Reject a model of another size than the oracle's.

    Raises
    ------
    UserError
        Naming the key of ``text_config``.
    """
    for key, size in oracle.sizes.items():
        if (config.get("text_config") or {}).get(key) != size:
            actual = (config.get("text_config") or {}).get(key)
            raise UserError(
                f"config.json: text_config.{key} is {actual}, that of {oracle.model} is {size}: the "
                "oracle has scores of that model and of what is quantized from it"
            )


def compute_scores(
    oracle: Oracle, pages: Sequence[Path], model: Any, processor: Any
) -> torch.Tensor:
    """Return the MaxSim scores [queries, pages] of a model, in float32.

    Parameters
    ----------
    oracle
        Gives the queries.
    pages
        Files, in the oracle's order.
    model, processor
        As `load_model` and `load_processor` return them.
    """
    from colqwen3.embedding.batches import embed

    queries = [embed(model, processor.process_texts([text]))[0] for text in oracle.queries]
    vectors = [embed(model, processor.process_images([open_page(Page(path))]))[0] for path in pages]
    return max_sim(queries, vectors)


def judge(oracle: Oracle, scores: torch.Tensor, quantized: bool) -> dict[str, Any]:
    """Compare scores with the oracle's.

    Parameters
    ----------
    oracle
        With the expected scores.
    scores
        [queries, pages].
    quantized
        A quantized model is not held to the tolerance: every query must keep its first page.

    Returns
    -------
    dict
        ``verdict`` (``pass`` or ``fail``), ``reason``, ``largest_difference`` and
        ``mean_difference`` of scores, ``mean_relative_difference``, ``first_pages_kept``, and the
        ``scores`` beside the ``expected`` ones.
    """
    expected = torch.tensor(oracle.scores)
    differences = (scores - expected).abs()
    largest = float(differences.max()) if bool(differences.isfinite().all()) else float("inf")
    kept = int((scores.argmax(1) == expected.argmax(1)).sum())
    same_order = kept == len(oracle.queries)
    if quantized:
        passed = same_order and largest < float("inf")
        reason = f"{kept} of {len(oracle.queries)} queries keep their first page"
    else:
        passed = largest <= oracle.tolerance
        reason = (
            f"the largest difference of a score is {largest:.5f}, allowed are {oracle.tolerance}"
        )
    return {
        "model": oracle.model,
        "quantized": quantized,
        "verdict": "pass" if passed else "fail",
        "reason": reason,
        "largest_difference": round(largest, 5),
        "mean_difference": round(float(differences.mean()), 5),
        "mean_relative_difference": round(float((differences / expected).mean()), 5),
        "first_pages_kept": kept,
        "scores": [[round(value, 5) for value in row] for row in scores.tolist()],
        "expected": [list(row) for row in oracle.scores],
    }
