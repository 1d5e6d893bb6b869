"""The files that let others load a checkpoint: its model code, and what sentence-transformers asks."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save

from colqwen3.model import ColQwen3, ColQwen3Config, ColQwen3Processor
from colqwen3.system.files import read_json, write_json

FIX = "run `dvc repro -f quantize`"


def ship_code(folder: Path) -> None:
    """Put the model's Python files into a model folder, and name them in its ``auto_map``.

    transformers' own mechanism chooses and copies the files. Only its last step, which writes the
    configs anew, is left out: transformers 5 writes fields that 4.57 cannot read, so the configs
    stay the publisher's and gain ``auto_map`` alone.

    Parameters
    ----------
    folder
        A model folder with config and processor files; both configs are rewritten.

    Raises
    ------
    UserError
        If a config is missing or damaged.
    """
    config = read_json(folder / "config.json", FIX)
    path = folder / "processor_config.json"
    processor_config = read_json(path, FIX) if path.exists() else {}
    processor_config["processor_class"] = ColQwen3Processor.__name__

    for kind in (ColQwen3Config, ColQwen3, ColQwen3Processor):
        kind.register_for_auto_class()
    # from_dict moves fields of nested configs where transformers 5 keeps them: give it a copy
    model_config = ColQwen3Config.from_dict(
        {k: copy.deepcopy(v) for k, v in config.items() if k != "quantization_config"}
    )
    custom_object_save(model_config, folder, config)
    with torch.device("meta"):  # only its class matters
        custom_object_save(ColQwen3(model_config), folder, config)
    processor = ColQwen3Processor.from_pretrained(str(folder))
    custom_object_save(processor, folder, processor_config)

    write_json(folder / "config.json", config)
    write_json(path, processor_config)


def ship_sentence_transformers(folder: Path) -> None:
    """Write what sentence-transformers' ``MultiVectorEncoder`` (6 and newer) loads a folder by."""
    embeddings = {"method": "forward", "method_output_name": "embeddings"}
    files: dict[str, Any] = {
        "modules.json": [
            {
                "idx": 0,
                "name": "0",
                "path": "",
                "type": "sentence_transformers.base.modules.transformer.Transformer",
            },
            {
                "idx": 1,
                "name": "1",
                "path": "1_MultiVectorMask",
                "type": "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
            },
        ],
        "config_sentence_transformers.json": {
            "model_type": "MultiVectorEncoder",
            "prompts": {"query": "", "document": ""},
            "similarity_fn_name": "maxsim",
        },
        # the model itself projects, normalises, and zeroes padding
        "sentence_bert_config.json": {
            "transformer_task": "retrieval",
            "modality_config": {"text": embeddings, "image": embeddings},
            "module_output_name": "token_embeddings",
        },
    }
    for name, value in files.items():
        write_json(folder / name, value)
