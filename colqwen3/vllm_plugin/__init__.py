"""A plugin of vLLM: its ColQwen3 with the projection's bias, for published folders and released ones.

vLLM calls `register` when it starts, since pyproject.toml names it under ``vllm.general_plugins``.
Nothing of this project but this package is imported there.
"""

ARCHITECTURE = "ColQwen3"
PLACE = "colqwen3.vllm_plugin.model:ColQwen3WithBias"


def register() -> None:
    """Enter the class into vLLM's registry in place of its own, which drops the bias."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, PLACE)
