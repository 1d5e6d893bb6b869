"""What serving engines read of a released folder: a chat template, the limit of visual tokens.

And numbers by which anyone sees that an engine computes what it should.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from colqwen3.model.loading import load_model, load_processor
from colqwen3.model.scoring import max_sim
from colqwen3.system.files import read_json, write_json

FIX = "run `dvc repro -f quantize`"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")
VLLM_VERSIONS = "0.30.0, 0.32.0"
TRANSFORMERS_VERSIONS = {
    "auto_round": "4.57.6 and 5.24.0",
    "auto_gptq": "5.23.0",
    "llm_compressor": "4.57.6 and 5.24.0",
}
"""What `make check-release` ran; metrics/engines/ has the figures, and a test holds both together."""
RUNTIME_SPEEDS = {
    "1 query of 26 tokens": (1.80, 1.80),
    "8 queries": (1.15, 1.15),
    "64 queries": (1.08, 1.24),
    "1 page of 1,271 tokens": (1.01, 1.04),
    "4 pages": (1.02, 1.15),
    "16 pages": (1.04, 1.18),
}
"""Of the pipeline's runtime with 4-bit weights and 16- or 8-bit activations, over the original's.

Random weights of the 4B model's shapes on an H100: metrics/size/serving-cuda.json; a test holds them together.
"""
RUNTIME_LOSSES = {
    "demonstration model of 5.8 million parameters, the worse of two recipes": (1.19, 1.09),
    "study model of 39.9 million parameters": (1.21, 1.10),
}
"""Loss of pages and queries with 8-bit activations over that with 16-bit ones, of the worse page set.

metrics/scale/activations-demo.json and activations-39m.json.
"""
QUERY = "total of the invoice"
SIZE, BARS = (128, 96), ((16, 16, 80, 32), (16, 48, 112, 56))
"""A page that needs no font and no resizing: its pixels are the same everywhere."""


def sample_page() -> Image.Image:
    """Return the page of the expected numbers, which the card draws too."""
    page = Image.new("RGB", SIZE, "white")
    for box in BARS:
        ImageDraw.Draw(page).rectangle(box, fill="black")
    return page


def ship_for_engines(folder: Path, max_num_visual_tokens: int) -> None:
    """Write the chat template and the limit of visual tokens into a released folder.

    The source's own templates are removed: they are for conversation, and give other prompts.

    Parameters
    ----------
    folder
        With the processor's and tokenizer's files; those that state a limit are rewritten.
    max_num_visual_tokens
        A page is shrunk until it has at most this many.

    Raises
    ------
    UserError
        If a file is missing or damaged.
    """
    shutil.copyfile(TEMPLATE, folder / TEMPLATE.name)
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    if path.exists() and "chat_template" in (tokenizer := read_json(path, FIX)):
        write_json(path, {key: value for key, value in tokenizer.items() if key != "chat_template"})
    path = folder / "preprocessor_config.json"
    write_json(path, _limited(read_json(path, FIX), max_num_visual_tokens))
    path = folder / "processor_config.json"
    processor = read_json(path, FIX)
    if isinstance(processor.get("image_processor"), dict):
        limited = _limited(processor["image_processor"], max_num_visual_tokens)
        write_json(path, {**processor, "image_processor": limited})


def _limited(images: dict[str, Any], max_num_visual_tokens: int) -> dict[str, Any]:
    """Return the config of an image processor with a limit, as its older and newer versions read it."""
    side = images.get("patch_size", 16) * images.get("merge_size", 2)
    longest = max_num_visual_tokens * side * side
    stored = (images.get("size") or {}).get("shortest_edge") or images.get("min_pixels") or side**2
    shortest = min(stored, longest)
    older = {"min_pixels": shortest, "max_pixels": longest}
    return {
        **images,
        **{key: value for key, value in older.items() if images.get(key) is not None},
        "size": {"longest_edge": longest, "shortest_edge": shortest},
    }


def expected_numbers(
    folder: Path, dtype: str, device: torch.device, max_num_visual_tokens: int
) -> dict[str, Any]:
    """Return what a query and a page give, computed from a checkpoint with dense weights.

    Parameters
    ----------
    folder
        A checkpoint that this project's loaders read.
    dtype
        ``float32`` or ``bfloat16``.
    device
        Where to compute.
    max_num_visual_tokens
        See `ship_for_engines`.

    Returns
    -------
    dict
        ``query``, the text; ``query_tokens`` and ``page_tokens``, their numbers of vectors;
        ``maxsim``; the first four values of the query's last vector and of the page's, to four
        digits.
    """
    model = load_model(folder, getattr(torch, dtype), device)
    processor = load_processor(folder, max_num_visual_tokens)
    inputs = (processor.process_texts([QUERY]), processor.process_images([sample_page()]))
    with torch.inference_mode():  # one by one, so that nothing is padded
        query, page = (model(**each.to(device)).embeddings[0].float().cpu() for each in inputs)
    return {
        "query": QUERY,
        "query_tokens": len(query),
        "page_tokens": len(page),
        "maxsim": round(float(max_sim([query], [page])), 3),
        "query_vector": [round(float(value), 4) for value in query[-1, :4]],
        "page_vector": [round(float(value), 4) for value in page[-1, :4]],
        "dtype": dtype,
    }
