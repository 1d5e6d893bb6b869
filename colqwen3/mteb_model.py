"""A ColQwen3 behind mteb's interface; mteb itself is imported only where it is needed.

Embeddings are computed as `colqwen3 embed` does, scores are MaxSim; everything else is mteb's.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.hub import find_model
from colqwen3.embedding.batches import page_batches, prepare_image
from colqwen3.embedding.embedder import cutter, load_embedder
from colqwen3.embedding.job import EmbeddingOptions
from colqwen3.embedding.preparing import prepare_ahead
from colqwen3.model.scoring import max_sim
from colqwen3.system.device import DTYPES, choose_device
from colqwen3.system.files import read_json
from colqwen3.system.progress import Progress

THREADS = min(4, os.cpu_count() or 1)
"""That prepare images while others are embedded."""


class ColQwen3Encoder:
    """A ColQwen3, original or quantized, as mteb's ``EncoderProtocol``.

    mteb knows that interface by its methods, so no base class of its is needed. Queries, page
    images and text documents are embedded; embeddings are unpadded, [tokens, embed_dim] each.

    Parameters
    ----------
    model_name
        What mteb calls the model; a Hub id when `source` is None.
    revision
        Commit of a Hub id.
    device
        A torch device; None: that of `options`.
    source
        Model folder or Hub id.
    options
        How to embed; None: the defaults of `EmbeddingOptions`.

    Raises
    ------
    UserError
        If the model cannot be found or loaded.
    """

    mteb_model_meta: Any = None

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        source: str | None = None,
        options: EmbeddingOptions | None = None,
        **_: Any,
    ) -> None:
        options = options or EmbeddingOptions()
        trust = options.trust_remote_code
        folder = find_model(source or model_name, revision, trust)
        where = torch.device(device) if device else choose_device(options.device)
        self.visual_tokens = options.visual_tokens_per_batch
        self.embedder = load_embedder(
            folder, DTYPES[options.dtype], where, options.max_num_visual_tokens, trust
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **_: Any,
    ) -> list[torch.Tensor]:
        """Embed what mteb's data loader yields; return float32 [tokens, embed_dim] per item.

        Its batches of texts are taken as they are; images are batched again within the budget of
        visual tokens. An item with both is a page: the model takes no text beside an image. The
        model takes no instructions, so task and prompt do not matter.
        """
        vectors: list[torch.Tensor] = []
        images = "image" in inputs.dataset.features
        with Progress("mteb pages" if images else "mteb texts", len(inputs.dataset)) as progress:
            for batch in self._embed_images(inputs) if images else self._embed_texts(inputs):
                vectors += batch
                progress.advance(len(batch))
        return vectors

    def _embed_texts(self, batches: Iterable[Any]) -> Iterator[list[torch.Tensor]]:
        for batch in batches:
            yield self.embedder.embed_texts(batch["text"])

    def _embed_images(self, batches: Iterable[Any]) -> Iterator[list[torch.Tensor]]:
        named = (
            (str(name), (str(name), image))
            for batch in batches
            for name, image in zip(batch["id"], batch["image"], strict=True)
        )
        processor = self.embedder.processor
        prepared = prepare_ahead(named, lambda item: prepare_image(*item, processor), THREADS)
        tokens = cutter(processor).visual_tokens
        together = page_batches(prepared, lambda page: tokens(page.grid), self.visual_tokens)
        for _, vectors in self.embedder.embed_batches(together):
            yield vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the MaxSim scores [queries, pages], computed on the model's device; see `max_sim`.

        Either side is a list of [tokens, embed_dim] or one [items, tokens, embed_dim], padded by 0.
        """
        queries = [torch.as_tensor(query).to(self.embedder.device) for query in embeddings1]
        return max_sim(queries, [torch.as_tensor(page) for page in embeddings2])

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Return the MaxSim score of each query with the page at its own place, [queries]."""
        pairs = zip(embeddings1, embeddings2, strict=True)
        return torch.cat([self.similarity([a], [b])[0] for a, b in pairs])


def register(source: str, revision: str | None, options: EmbeddingOptions) -> Any:
    """Enter a model into mteb's registry of models; return its ``ModelMeta``.

    A folder is called ``local/<folder name>``, so that no path gets into results. A Hub id that
    mteb knows already is from now on loaded by `ColQwen3Encoder`, without the publisher's code.

    Raises
    ------
    UserError
        If the model cannot be found, or its config.json is missing or damaged.
    """
    from mteb.models.model_implementations import MODEL_REGISTRY
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    folder = find_model(source, revision, options.trust_remote_code)
    config = read_json(folder / "config.json", "give a complete model folder")
    meta = ModelMeta(
        loader=ColQwen3Encoder,
        loader_kwargs={"source": source, "options": options},
        name=f"local/{folder.resolve().name}" if Path(source).is_dir() else source,
        revision=revision,
        embed_dim=config.get("embed_dim") or config.get("vector_dim"),
        similarity_fn_name=ScoringFunction.MAX_SIM,
        model_type=["late-interaction"],
        modalities=["image", "text"],
        framework=["PyTorch", "Transformers", "safetensors"],
        use_instructions=False,
        # mteb requires the rest, which a folder does not state
        release_date=None, languages=None, n_parameters=None, memory_usage_mb=None,
        max_tokens=None, license=None, open_weights=None, public_training_code=None,
        public_training_data=None, training_datasets=None,
    )  # fmt: skip
    MODEL_REGISTRY[str(meta.name)] = meta
    return meta


def load_registered(meta: Any) -> ColQwen3Encoder:
    """Load a registered model.

    ``meta.load_model()`` does the same, but rejects every image model where torchvision is not
    installed; ours does not need it.
    """
    encoder = ColQwen3Encoder(meta.name, meta.revision, **meta.loader_kwargs)
    encoder.mteb_model_meta = meta
    return encoder
