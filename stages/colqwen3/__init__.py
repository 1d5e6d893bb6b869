"""The ColQwen3 model family, native on transformers: no code of a model folder is needed.

Importing this package registers the classes with transformers' AutoConfig, AutoModel and
AutoProcessor. Its modules import each other only relatively, so that they can travel with a
checkpoint.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration import ColQwen3Config
from .modeling import ColQwen3
from .processing import ColQwen3Processor

__all__ = ["ColQwen3", "ColQwen3Config", "ColQwen3Processor"]

AutoConfig.register(ColQwen3Config.model_type, ColQwen3Config, exist_ok=True)
AutoModel.register(ColQwen3Config, ColQwen3, exist_ok=True)
AutoProcessor.register(ColQwen3Config, ColQwen3Processor, exist_ok=True)
