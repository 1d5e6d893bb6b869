"""ColQwen3 visual-document retrievers, original or quantized: load, embed, score, serve, verify.

>>> import colqwen3
>>> runtime = colqwen3.load_runtime("path/to/model")
>>> scores = colqwen3.max_sim(runtime.embed_queries(["total of the invoice"]), page_vectors)

torch and transformers are imported when a name that needs them is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colqwen3.checkpoint.hub import find_model
    from colqwen3.dataset.beir import read_dataset, read_queries
    from colqwen3.dataset.pages import find_pages, open_page
    from colqwen3.embedding.job import EmbeddingOptions, embed_to_file
    from colqwen3.embedding.store import read_embeddings, write_embeddings
    from colqwen3.inspection import inspect_folder
    from colqwen3.model import ColQwen3, ColQwen3Config, ColQwen3Processor
    from colqwen3.model.loading import load_model, load_processor
    from colqwen3.model.scoring import max_sim
    from colqwen3.release.verify import verify
    from colqwen3.serving import Runtime, load_runtime
    from colqwen3.system.errors import UserError

_PLACES = {
    "ColQwen3": "colqwen3.model",
    "ColQwen3Config": "colqwen3.model",
    "ColQwen3Processor": "colqwen3.model",
    "EmbeddingOptions": "colqwen3.embedding.job",
    "Runtime": "colqwen3.serving",
    "UserError": "colqwen3.system.errors",
    "embed_to_file": "colqwen3.embedding.job",
    "find_model": "colqwen3.checkpoint.hub",
    "find_pages": "colqwen3.dataset.pages",
    "inspect_folder": "colqwen3.inspection",
    "load_model": "colqwen3.model.loading",
    "load_processor": "colqwen3.model.loading",
    "load_runtime": "colqwen3.serving",
    "max_sim": "colqwen3.model.scoring",
    "open_page": "colqwen3.dataset.pages",
    "read_dataset": "colqwen3.dataset.beir",
    "read_embeddings": "colqwen3.embedding.store",
    "read_queries": "colqwen3.dataset.beir",
    "verify": "colqwen3.release.verify",
    "write_embeddings": "colqwen3.embedding.store",
}

__all__ = [
    "ColQwen3",
    "ColQwen3Config",
    "ColQwen3Processor",
    "EmbeddingOptions",
    "Runtime",
    "UserError",
    "embed_to_file",
    "find_model",
    "find_pages",
    "inspect_folder",
    "load_model",
    "load_processor",
    "load_runtime",
    "max_sim",
    "open_page",
    "read_dataset",
    "read_embeddings",
    "read_queries",
    "verify",
    "write_embeddings",
]


def __getattr__(name: str) -> Any:
    """Import what a public name needs, once it is used (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'colqwen3' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
