"""The section ``release`` of params.yaml: how each recipe's checkpoint is published."""

from typing import Literal

from pydantic import field_validator

from stages.pipeline.params import Section

Format = Literal["auto_round", "auto_gptq", "llm_compressor", "gguf"]
IMPOSSIBLE_FORMATS = {
    "auto_awq": "AutoAWQ loads only model classes that it knows, and ColQwen3 is none of them",
    "mlx": "MLX loads only model classes that it knows, and ColQwen3 is none of them",
}
"""Formats that other tools write for other models -> why they cannot hold this one."""


class ReleaseOptions(Section):
    """How one checkpoint is published; nothing here quantizes anything again."""

    format: Format = "auto_round"
    even_if_worse: bool = False

    @field_validator("format", mode="before")
    @classmethod
    def _possible_format(cls, value: object) -> object:
        if isinstance(value, str) and value in IMPOSSIBLE_FORMATS:
            raise ValueError(f"cannot be {value}: {IMPOSSIBLE_FORMATS[value]}")
        return value
