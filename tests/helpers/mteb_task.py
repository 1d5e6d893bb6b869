"""A folder in the BEIR convention as a task of mteb, and a small set to draw into one."""

import json
from pathlib import Path
from typing import Any, ClassVar

import datasets
import mteb
from mteb.abstasks import AbsTaskRetrieval
from PIL import Image, ImageDraw

from colqwen3.dataset.beir import read_dataset

WORDS = [
    "boiler", "pump", "valve", "ledger", "invoice", "harvest",
    "tariff", "glacier", "turbine", "census", "orchard", "ferry",
]  # fmt: skip
PAGES = 14


def draw_set(folder: Path) -> Path:
    """Pages of several sizes, the last one twice so that scores tie, and graded judgements."""
    (folder / "corpus").mkdir(parents=True)
    for number in range(PAGES):
        seed = min(number, PAGES - 2)
        page = Image.new("RGB", (96 + 32 * (seed % 3), 160 - 32 * (seed % 2)), "white")
        draw = ImageDraw.Draw(page)
        for line in range(4):
            words = f"{WORDS[(seed + line) % 12]} {WORDS[seed * 5 % 12]} {seed}"
            draw.text((6, 8 + 24 * line), words, fill=(20 * line, 0, 7 * seed))
        page.save(folder / f"corpus/p{number:02d}.png")
    lines = [json.dumps({"_id": f"q{i}", "text": f"{word} of {i}"}) for i, word in enumerate(WORDS)]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    judged = [
        f"q{i}\tp{(5 * i + step) % PAGES:02d}\t{score}"
        for i in range(len(WORDS))
        for step, score in ((1, 2), (3, 1), (6, 0))
    ]
    (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    return folder


class FolderTask(AbsTaskRetrieval):  # type: ignore[misc]
    """A BEIR-like folder as a task of mteb; keeps the figures that mteb rounds afterwards."""

    folder: ClassVar[Path]
    by_query: ClassVar[dict[str, dict[str, float]]]
    runs: ClassVar[dict[str, dict[str, float]]]
    metadata = mteb.TaskMetadata(
        name="FolderPages",
        description="Pages of a folder.",
        reference=None,
        dataset={"path": "none", "revision": "none"},
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_5",
    )

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        dataset = read_dataset(self.folder)
        images = [str(page.path) for page in dataset.pages.values()]
        corpus = datasets.Dataset.from_dict({"id": list(dataset.pages), "image": images})
        texts = {"id": list(dataset.queries), "text": list(dataset.queries.values())}
        split = {
            "corpus": corpus.cast_column("image", datasets.Image()),
            "queries": datasets.Dataset.from_dict(texts),
            "relevant_docs": dataset.relevance,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True

    def task_specific_scores(self, scores: Any, qrels: Any, results: Any, **_: Any) -> Any:
        FolderTask.by_query, FolderTask.runs = scores, results
        return {}
