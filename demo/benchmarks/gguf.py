"""What becomes of retrieval in llama.cpp: GGUF files of several models against torch, on the evaluation set.

`python -m demo.benchmarks.gguf original=demo/model=artifacts/embeddings/original.safetensors ...`
writes each folder as GGUF files, embeds the set with them, and compares with the embeddings that
`dvc repro` left. Speed is processor time of one thread, llama.cpp's divided by that of torch in
float32 on dequantized weights, both in turns: a ratio, since absolute times are this machine's.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colqwen3.dataset.beir import Dataset, read_dataset
from colqwen3.dataset.pages import open_page
from colqwen3.embedding.store import Embeddings, read_embeddings
from colqwen3.gguf.export import export_gguf
from colqwen3.model.loading import load_model, load_processor
from colqwen3.system.errors import UserError, run
from colqwen3.system.files import write_json
from demo.benchmarks.measure import installed, machine
from stages.evaluation.cosine import token_cosines
from stages.evaluation.retrieval import Run, finite_scores, measure

TIMED = {"query": 12, "page": 6}
"""Items that each program embeds for the ratios, after one untimed."""
RUNS_BY = ("gguf", "xllamacpp")


def embed(embedder: Any, dataset: Dataset) -> Embeddings:
    """Return the embeddings of a set by llama.cpp."""
    queries = {name: embedder.embed_query(text) for name, text in dataset.queries.items()}
    pages = {name: embedder.embed_page(open_page(page)) for name, page in dataset.pages.items()}
    first, second = (
        {name: torch.from_numpy(value) for name, value in part.items()} for part in (queries, pages)
    )
    return Embeddings(first, second)


def compare(actual: Embeddings, expected: Embeddings, dataset: Dataset) -> dict[str, Any]:
    """Return minimum and mean cosine of a token, and nDCG@5 of both."""
    results: dict[str, Any] = {"cosine": {}, "ndcg_at_5": {}}
    for kind in ("queries", "pages"):
        ours, theirs = getattr(actual, kind), getattr(expected, kind)
        cosines = torch.cat([torch.from_numpy(token_cosines(theirs[i], ours[i])) for i in theirs])
        results["cosine"][kind] = {
            "minimum": round(float(cosines.min()), 7),
            "mean": round(float(cosines.mean()), 7),
        }
    for program, embeddings in (("torch", expected), ("llama.cpp", actual)):
        queries, pages = embeddings.queries, embeddings.pages
        scores = finite_scores(list(queries.values()), list(pages.values()))
        found = measure(Run(tuple(queries), tuple(pages), scores), dataset.relevance)
        results["ndcg_at_5"][program] = round(float(found["ndcg_at_5"].mean()), 6)
    return results


def time_ratios(embedder: Any, folder: Path, dataset: Dataset) -> dict[str, float]:
    """Return llama.cpp's processor time divided by torch's, the median of items, for each kind."""
    model = load_model(folder, torch.float32, torch.device("cpu"))
    processor = load_processor(folder, 1280)

    def by_torch(inputs: Any) -> None:
        with torch.inference_mode():
            model(**inputs)

    texts = list(dataset.queries.values())[: TIMED["query"] + 1]
    images = [open_page(page) for page in list(dataset.pages.values())[: TIMED["page"] + 1]]
    programs: dict[str, list[tuple[Callable[[], object], Callable[[], object]]]] = {
        "query": [
            (lambda t=text: embedder.embed_query(t), lambda t=text: by_torch(processor.process_texts([t])))  # type: ignore[misc]
            for text in texts
        ],
        "page": [
            (lambda i=image: embedder.embed_page(i), lambda i=image: by_torch(processor.process_images([i])))  # type: ignore[misc]
            for image in images
        ],
    }  # fmt: skip
    ratios = {}
    for kind, pairs in programs.items():
        seconds = [[_seconds(program) for program in pair] for pair in pairs][1:]
        ratios[kind] = round(statistics.median(ours / theirs for ours, theirs in seconds), 2)
    return ratios


def _seconds(program: Callable[[], object]) -> float:
    start = time.process_time()
    program()
    return time.process_time() - start


def main() -> None:
    """Measure the given models and write their results.

    Raises
    ------
    UserError
        If a model is not given as NAME=FOLDER=EMBEDDINGS, or cannot be read or written as GGUF.
    """
    parser = argparse.ArgumentParser(
        prog="python -m demo.benchmarks.gguf", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER=EMBEDDINGS")
    parser.add_argument("--dataset", type=Path, default=Path("demo/pages/evaluation"))
    parser.add_argument("--out", type=Path, default=Path("metrics/gguf/demo.json"))
    args = parser.parse_args()
    from colqwen3.gguf.run_gguf import Embedder

    torch.set_num_threads(1)
    dataset = read_dataset(args.dataset)
    described = machine(False)
    described["versions"] |= {name: installed(name) for name in RUNS_BY}
    results: dict[str, Any] = {
        "command": " ".join(["python -m demo.benchmarks.gguf", *sys.argv[1:]]),
        "machine": described,
        "models": {},
    }
    for model in args.models:
        parts = model.split("=")
        if len(parts) != 3:
            raise UserError(f"{model!r} is not NAME=FOLDER=EMBEDDINGS; correct it")
        name, folder, expected = parts[0], Path(parts[1]), read_embeddings(Path(parts[2]))
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary)
            export_gguf(folder, out)
            embedder = Embedder(out, threads=1)
            results["models"][name] = {
                **compare(embed(embedder, dataset), expected, dataset),
                "bytes": {path.name: path.stat().st_size for path in sorted(out.glob("*.gguf"))},
                "time_to_torch_float32": time_ratios(embedder, folder, dataset),
            }
        print(name, results["models"][name], flush=True)
    write_json(args.out, results)


if __name__ == "__main__":
    run(main)
