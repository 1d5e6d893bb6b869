"""Experiment: the language model in bitsandbytes' NF4, measured as the recipes are.

`python -m stages.nf4` loads the source model through transformers and bitsandbytes (an optional
extra), embeds the evaluation set, and prints how embeddings and search differ from the original's.
It makes no checkpoint. NF4: Dettmers et al., "QLoRA", arXiv:2305.14314.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from stages.compute import DTYPES, choose_device, make_deterministic
from stages.dataset import read_dataset
from stages.embed import embed_all
from stages.embeddings import Embeddings, read_embeddings
from stages.errors import PipelineError, run
from stages.evaluate import check_items, evaluate, round_floats
from stages.layout import VISION
from stages.manifest import find_inspected_model, read_manifest
from stages.params import load_params
from stages.paths import EMBEDDINGS

KEPT = [VISION, "embedding_proj_layer"]
"""Modules that stay 16-bit, as in the recipes."""


def load_nf4(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a model with the linears of its language model in NF4, blocks of 64.

    Raises
    ------
    PipelineError
        If bitsandbytes is not installed, or cannot do it on this device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PipelineError(
            "bitsandbytes is not installed; install it, as in `pip install bitsandbytes`"
        )
    from transformers import AutoModel, BitsAndBytesConfig

    import stages.colqwen3  # noqa: F401 - registers the model

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT,
    )
    try:
        model = AutoModel.from_pretrained(
            folder, dtype=dtype, device_map=str(device), quantization_config=nf4
        )
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PipelineError(
            f"{folder}: bitsandbytes cannot load it in NF4 on {device} ({reason}); try another device"
        ) from None
    return model.eval()


def main() -> None:
    """Print the metrics of the source model in NF4."""
    from stages.colqwen3.loading import load_processor

    argparse.ArgumentParser(prog="python -m stages.nf4", description=__doc__).parse_args()
    params = load_params()
    folder = find_inspected_model(params.model, read_manifest())
    dataset = read_dataset(Path(params.evaluate.dataset))
    original = read_embeddings(EMBEDDINGS / "original.safetensors")
    make_deterministic()
    processor = load_processor(folder, params.model.max_num_visual_tokens)
    device = choose_device(params.compute.device)
    model = load_nf4(folder, DTYPES[params.embed.dtype], device)
    made = Embeddings(*embed_all(model, processor, dataset.queries, dataset.pages, params))
    check_items(dataset, original, made)
    metrics, _ = evaluate(dataset, original, made)
    print(json.dumps(round_floats(metrics), indent=2, sort_keys=True))


if __name__ == "__main__":
    run(main)
