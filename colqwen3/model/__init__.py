"""The ColQwen3 model family, native on transformers: no code of a model folder is needed.

Importing this package registers the classes with transformers' AutoConfig, AutoModel and
AutoProcessor. The modules it imports here import each other only relatively and carry the names
of published models' files, so that they can travel with a checkpoint.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_colqwen3 import ColQwen3Config
from .modeling_colqwen3 import ColQwen3
from .processing_colqwen3 import ColQwen3Processor

__all__ = ["ColQwen3", "ColQwen3Config", "ColQwen3Processor"]

AutoConfig.register(ColQwen3Config.model_type, ColQwen3Config, exist_ok=True)
AutoModel.register(ColQwen3Config, ColQwen3, exist_ok=True)
AutoProcessor.register(ColQwen3Config, ColQwen3Processor, exist_ok=True)
