"""Configuration of ColQwen3: that of Qwen3-VL and the width of the projection."""

from typing import Any

from transformers import Qwen3VLConfig


class ColQwen3Config(Qwen3VLConfig):  # type: ignore[misc]
    """Configuration of a ColQwen3 retriever.

    Parameters
    ----------
    embed_dim
        Numbers in the vector of one token.
    padding_side
        Side on which the processor pads token sequences.
    **kwargs
        Fields of `transformers.Qwen3VLConfig`: ``text_config``, ``vision_config``, token ids.
    """

    model_type = "colqwen3"

    def __init__(self, embed_dim: int = 320, padding_side: str = "left", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embed_dim = embed_dim
        self.padding_side = padding_side
