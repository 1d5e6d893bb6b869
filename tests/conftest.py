"""What several test modules share."""

from typing import Any

import pytest


@pytest.fixture
def published_4b() -> dict[str, Any]:
    """Return the sizes in the config of TomoroAI/tomoro-colqwen3-embed-4b."""
    return {
        "embed_dim": 320,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936,
        },
        "vision_config": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "num_position_embeddings": 2304, "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    }  # fmt: skip
