"""Break the reference on purpose and print how far the golden embeddings move.

An oracle is worth as much as the mistakes it shows. Each row below is a mistake that a native
implementation can make; the figures are the smallest cosine between the right and the wrong
embedding of a token, and the largest difference of a component. Run it after `make_golden.py`, in
the same environment. It exits with an error when a mistake moves no component by `MARGIN`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from make_golden import (
    MODEL_DIR,
    PAGES_DIR,
    QUERIES_PATH,
    ColQwen3,
    Item,
    build_image_processor,
    embed,
    load_items,
    load_reference,
    page_item,
)
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast

#: Ten times the tolerance of 1e-3 that tests may reasonably use on the components of pages.
MARGIN = 1e-2

Embeddings = dict[str, Tensor]


def skip_deepstack(model: ColQwen3) -> None:
    """Leave out the features of the intermediate vision layers."""
    model.vlm.model.language_model._deepstack_process = lambda hidden, _mask, _visual: hidden


def reverse_deepstack(model: ColQwen3) -> None:
    """Use the deepstack mergers in the wrong order."""
    visual = model.vlm.model.visual
    visual.deepstack_merger_list = nn.ModuleList(reversed(visual.deepstack_merger_list))


def skip_last_deepstack(model: ColQwen3) -> None:
    """Inject all deepstack features but the last."""
    visual = model.vlm.model.visual
    visual.deepstack_visual_indexes = visual.deepstack_visual_indexes[:-1]


def set_rope_theta(theta: float) -> Callable[[ColQwen3], None]:
    """Return a mistake that uses another rotary base."""

    def mistake(model: ColQwen3) -> None:
        rotary = model.vlm.model.language_model.rotary_emb
        dim = 2 * len(rotary.inv_freq)
        rotary.inv_freq = theta ** -(torch.arange(0, dim, 2).float() / dim)

    return mistake


def drop_projection_bias(model: ColQwen3) -> None:
    """Build the projection without its bias."""
    nn.init.zeros_(model.embedding_proj_layer.bias)


def chunked_mrope(model: ColQwen3) -> None:
    """Lay the three position components out one after another."""

    def chunked(freqs: Tensor, section: list[int]) -> Tensor:
        parts = freqs.split(section, dim=-1)
        return torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)

    model.vlm.model.language_model.rotary_emb.apply_interleaved_mrope = chunked


def default_mrope_section(model: ColQwen3) -> None:
    """Fall back to the section that the library uses when it finds none."""
    model.vlm.model.language_model.rotary_emb.mrope_section = [24, 20, 20]


def swapped_axes(model: ColQwen3) -> None:
    """Use the row position where the column position belongs and the other way round."""
    rotary = model.vlm.model.language_model.rotary_emb
    interleave = rotary.apply_interleaved_mrope
    rotary.apply_interleaved_mrope = lambda freqs, section: interleave(freqs[[0, 2, 1]], section)


def skip_final_norm(model: ColQwen3) -> None:
    """Project the hidden state before the last norm."""
    model.vlm.model.language_model.norm = nn.Identity()


def skip_qk_norm(model: ColQwen3) -> None:
    """Leave out the norms of queries and keys."""
    for layer in model.vlm.model.language_model.layers:
        layer.self_attn.q_norm = nn.Identity()
        layer.self_attn.k_norm = nn.Identity()


def skip_vision_positions(model: ColQwen3) -> None:
    """Leave out the learned positions of the patches."""
    nn.init.zeros_(model.vlm.model.visual.pos_embed.weight)


def skip_vision_rope(model: ColQwen3) -> None:
    """Leave out the rotary positions of the patches."""
    nn.init.zeros_(model.vlm.model.visual.rotary_pos_emb.inv_freq)


MODEL_MISTAKES: dict[str, Callable[[ColQwen3], None]] = {
    "deepstack not injected": skip_deepstack,
    "deepstack order reversed": reverse_deepstack,
    "last deepstack layer left out": skip_last_deepstack,
    "rope_theta 1e4": set_rope_theta(1e4),
    "rope_theta 5e5": set_rope_theta(5e5),
    "projection bias dropped": drop_projection_bias,
    "chunked M-RoPE": chunked_mrope,
    "mrope_section [24, 20, 20]": default_mrope_section,
    "M-RoPE rows and columns swapped": swapped_axes,
    "final norm skipped": skip_final_norm,
    "q/k norm skipped": skip_qk_norm,
    "vision positions skipped": skip_vision_positions,
    "vision rotary skipped": skip_vision_rope,
}


def embed_all(model: ColQwen3, items: dict[str, Item]) -> Embeddings:
    """Return the embeddings of every item."""
    return {key: embed(model, item) for key, item in items.items()}


def figures(right: Embeddings, wrong: Embeddings) -> tuple[float, float]:
    """Return the smallest cosine over all tokens and the largest difference of a component."""
    cosine = min(float((right[key] * wrong[key]).sum(dim=-1).min()) for key in right)
    return cosine, max(float((right[key] - wrong[key]).abs().max()) for key in right)


def main() -> None:
    """Print the table and fail on a mistake that does not show."""
    tokenizer = Qwen2TokenizerFast.from_pretrained(MODEL_DIR)
    model = load_reference()
    queries, pages = load_items(tokenizer, build_image_processor())
    right_queries, right_pages = embed_all(model, queries), embed_all(model, pages)
    weakest = math.inf

    def report(name: str, wrong_queries: Embeddings | None, wrong_pages: Embeddings | None) -> None:
        nonlocal weakest
        cells, shift = [], 0.0
        for right, wrong in ((right_queries, wrong_queries), (right_pages, wrong_pages)):
            if wrong is None:
                cells.append("not affected")
                continue
            cosine, difference = figures(right, wrong)
            shift = max(shift, difference)
            cells.append(f"{cosine:.4f} / {difference:.3f}")
        weakest = min(weakest, shift)
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)

    print("| mistake | queries: min cos / max diff | pages: min cos / max diff |\n|---|---|---|")
    for name, mistake in MODEL_MISTAKES.items():
        broken = copy.deepcopy(model)
        with torch.no_grad():
            mistake(broken)
        report(name, embed_all(broken, queries), embed_all(broken, pages))

    flat = {
        stem: embed(
            model, item, torch.arange(item.input_ids.shape[1]).expand(3, 1, -1).contiguous()
        )
        for stem, item in pages.items()
    }
    report("1-D positions on pages", None, flat)

    clip = build_image_processor(
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    report("CLIP mean and std", None, embed_all(model, load_items(tokenizer, clip)[1]))
    bilinear = build_image_processor(resample=Image.Resampling.BILINEAR)
    report("bilinear resize", None, embed_all(model, load_items(tokenizer, bilinear)[1]))

    composited = dict(right_pages)
    stem = "stamp_61x43_rgba"
    with Image.open(PAGES_DIR / f"{stem}.png") as image:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        item = page_item(tokenizer, build_image_processor(), canvas.convert("RGB"))
    composited[stem] = embed(model, item)
    report("alpha blended on white", None, composited)

    texts = json.loads(QUERIES_PATH.read_text(encoding="utf-8"))
    unstripped = dict(right_queries)
    for key, text in texts.items():
        tail = queries[key].input_ids[:, -10:]
        leading = tokenizer(text, return_tensors="pt")["input_ids"].long()
        ids = torch.cat([leading, tail], dim=1)
        # Only the augmentation tokens are on both sides; compare those.
        unstripped[key] = right_queries[key].clone()
        unstripped[key][-10:] = embed(model, replace(queries[key], input_ids=ids))[-10:]
    report("query not stripped", unstripped, None)

    if weakest < MARGIN:
        raise SystemExit(f"a mistake moves no component by more than {weakest:.4f}")


if __name__ == "__main__":
    main()
