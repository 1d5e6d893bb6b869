"""Experiment: the language model in bitsandbytes' NF4, measured as the recipes are.

`python -m stages.tools.nf4` loads the source model through transformers and bitsandbytes (an optional
extra), embeds the evaluation set, and prints how embeddings and search differ from the original's.
It makes no checkpoint. NF4: Dettmers et al., "QLoRA", arXiv:2305.14314.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from colqwen3.checkpoint.layout import VISION
from colqwen3.dataset.beir import read_dataset
from colqwen3.embedding.embedder import embed_all
from colqwen3.embedding.store import Embeddings, read_embeddings
from colqwen3.system.device import DTYPES, choose_device, make_deterministic
from colqwen3.system.errors import UserError, first_line, run
from stages.checking.params import Params
from stages.evaluation.comparison import check_items, evaluate, round_figures
from stages.pipeline.manifest import find_inspected_model, read_manifest
from stages.pipeline.params import load_params
from stages.pipeline.paths import EMBEDDINGS

KEPT = [VISION, "embedding_proj_layer"]
"""Modules that stay 16-bit, as in the recipes."""


def load_nf4(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a model with the linears of its language model in NF4, blocks of 64.

    Raises
    ------
    UserError
        If bitsandbytes is not installed, or cannot do it on this device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "bitsandbytes is not installed; install it, as in `pip install bitsandbytes`"
        )
    from transformers import AutoModel, BitsAndBytesConfig

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
        reason = first_line(error)
        raise UserError(
            f"{folder}: bitsandbytes cannot load it in NF4 on {device} ({reason}); try another device"
        ) from None
    return model.eval()


def main() -> None:
    """Print the metrics of the source model in NF4."""
    from colqwen3.model.loading import load_processor

    argparse.ArgumentParser(prog="python -m stages.tools.nf4", description=__doc__).parse_args()
    params = load_params(Params)
    folder = find_inspected_model(params.model, read_manifest())
    dataset = read_dataset(Path(params.evaluate.dataset))
    original = read_embeddings(EMBEDDINGS / "original.safetensors")
    make_deterministic()
    processor = load_processor(folder, params.model.max_num_visual_tokens)
    device = choose_device(params.compute.device)
    model = load_nf4(folder, DTYPES[params.embed.dtype], device)
    bounds = params.embed
    quantized = Embeddings(
        *embed_all(
            model, processor, dataset.queries, dataset.pages,
            bounds.queries_per_batch, bounds.visual_tokens_per_batch,
        )
    )  # fmt: skip
    check_items(dataset, original, quantized)
    metrics = evaluate(dataset, original, quantized).metrics
    print(json.dumps(round_figures(metrics), indent=2, sort_keys=True))


if __name__ == "__main__":
    run(main)
