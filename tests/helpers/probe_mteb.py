"""Let mteb run a retrieval task on a model folder, with its own wrapper or sentence-transformers.

    python probe_mteb.py FOLDER DATASET ROUTE

DATASET is a folder in the BEIR convention with images, ROUTE is ``ColQwen3Wrapper`` or
``MultiVectorWrapper``. Prints the figures as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import mteb
import torch
from mteb.abstasks import AbsTaskRetrieval


class FolderTask(AbsTaskRetrieval):  # type: ignore[misc]
    """The folder as a task."""

    metadata = mteb.TaskMetadata(
        name="FolderPages", description="Pages of a folder.", reference=None,
        dataset={"path": "none", "revision": "none"}, type="DocumentUnderstanding",
        category="t2i", modalities=["text", "image"], eval_splits=["test"],
        eval_langs=["eng-Latn"], main_score="ndcg_at_5",
    )  # fmt: skip

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        folder = Path(sys.argv[2])
        images = {path.stem: str(path) for path in sorted((folder / "corpus").iterdir())}
        lines = (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()
        texts = {row["_id"]: row["text"] for row in map(json.loads, lines)}
        relevant: dict[str, dict[str, int]] = {}
        for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
            query, page, score = line.split("\t")
            relevant.setdefault(query, {})[page] = int(score)
        corpus = datasets.Dataset.from_dict({"id": list(images), "image": list(images.values())})
        queries = {"id": list(texts), "text": list(texts.values())}
        split = {
            "corpus": corpus.cast_column("image", datasets.Image()),
            "queries": datasets.Dataset.from_dict(queries),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def main() -> None:
    folder, route = sys.argv[1], sys.argv[3]
    model: Any
    if route == "ColQwen3Wrapper":
        from mteb.models.model_implementations.colqwen_models import ColQwen3Wrapper, colqwen3_4b

        model = ColQwen3Wrapper(folder, dtype=torch.float32, device="cpu")
        model.mteb_model_meta = colqwen3_4b.model_copy(update={"name": "local/release"})
    else:
        from mteb.models import MultiVectorWrapper

        options = {"dtype": torch.float32}
        model = MultiVectorWrapper(
            folder, device="cpu", trust_remote_code=True, model_kwargs=options
        )
        known = {"name": "local/release", "modalities": ["image", "text"]}
        model.mteb_model_meta = model.mteb_model_meta.model_copy(update=known)
    result = mteb.evaluate(model, FolderTask(), cache=None, encode_kwargs={"batch_size": 4})
    (scores,) = result.task_results[0].scores["test"]
    print(json.dumps({key: scores[key] for key in ("ndcg_at_5", "recall_at_1")}))


if __name__ == "__main__":
    main()
