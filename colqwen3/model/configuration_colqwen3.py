"""Configuration of ColQwen3: that of Qwen3-VL and the width of the projection."""

from typing import Any

from transformers import Qwen3VLConfig


class ColQwen3Config(Qwen3VLConfig):  # type: ignore[misc]
    """Configuration of a ColQwen3 retriever.

    Parameters
    ----------
    embed_dim
        Numbers in the vector of one token; 320 if neither this nor ``vector_dim`` is given.
    padding_side
        Side on which the processor pads token sequences.
    vector_dim
        The same number in a released folder, whose config.json has no ``embed_dim``: vLLM builds
        the projection without its bias from a config that has one.
    **kwargs
        Fields of `transformers.Qwen3VLConfig`: ``text_config``, ``vision_config``, token ids.

    Raises
    ------
    ValueError
        If ``embed_dim`` and ``vector_dim`` differ.
    """

    model_type = "colqwen3"

    def __init__(
        self,
        embed_dim: int | None = None,
        padding_side: str = "left",
        vector_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if None not in (embed_dim, vector_dim) and embed_dim != vector_dim:
            raise ValueError(f"embed_dim {embed_dim} and vector_dim {vector_dim} differ")
        width = vector_dim if embed_dim is None else embed_dim
        self.embed_dim = 320 if width is None else width
        self.padding_side = padding_side
