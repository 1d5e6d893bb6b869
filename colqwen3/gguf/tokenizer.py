"""The tokenizer of a model folder as llama.cpp takes it: byte-level BPE with Qwen2's splitting rule.

llama.cpp knows splitting rules by name and has no normalization: the program that runs the files
normalizes queries to NFC itself. A tokenizer that differs in anything else is rejected, because it
would give other ids without a word.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from colqwen3.system.errors import UserError, first_line

MODEL, SPLITTING = "gpt2", "qwen2"
"""Names of byte-level BPE and of Qwen2's splitting rule in llama.cpp."""
QWEN2_PATTERNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens: of text, special, matched as a whole in text, and filling the vocabulary."""


PAGE_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|endoftext|>",
)  # fmt: skip
"""Special tokens in the prompt of a page."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    tokens: list[str]
    """One per row of the token embeddings."""
    types: list[int]
    merges: list[str]
    """Pairs that BPE joins, separated by a space, the first ones first."""
    end: int | None
    """Id of the end-of-text token."""
    padding: int
    """Id of the padding token, which is also ColQwen3's augmentation token."""


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Return the tokenizer of a model folder.

    It is read as transformers reads it, so that every form of tokenizer files will do; no code of
    the folder runs.

    Parameters
    ----------
    folder
        The model folder.
    size
        Rows of the token embeddings; what the tokenizer lacks is filled with unused tokens.

    Raises
    ------
    UserError
        If the files are missing or damaged, or llama.cpp would tokenize otherwise.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        plain, usual = (tokenizer("a", add_special_tokens=on)["input_ids"] for on in (False, True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: tokenizer cannot be loaded ({first_line(error)}); fetch tokenizer.json again"
        ) from None
    added = {token["id"]: token for token in content["added_tokens"]}
    special = {token["content"] for token in added.values() if token["special"]}
    if not plain or not special.issuperset(PAGE_TOKENS) or tokenizer.pad_token_id is None:
        raise UserError(
            f"{folder}: its tokenizer has no tokens for text, padding or pages; "
            "fetch tokenizer.json and tokenizer_config.json again"
        )
    if problem := "adds tokens to every text" if usual != plain else find_difference(content):
        raise UserError(
            f"{folder}: tokenizer {problem}, which llama.cpp does not do; "
            "only tokenizers of the Qwen2 and Qwen3 families can be written as GGUF"
        )
    by_id = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    if max([*by_id, *added]) >= size:
        raise UserError(
            f"{folder}: tokenizer has {max([*by_id, *added]) + 1} tokens, the model {size}; "
            "fetch tokenizer.json and config.json again"
        )
    tokens, types = [], []
    for token_id in range(size):
        if token_id in added:
            tokens.append(added[token_id]["content"])
            types.append(CONTROL if added[token_id]["special"] else USER_DEFINED)
        else:
            tokens.append(by_id.get(token_id, f"[PAD{token_id}]"))
            types.append(NORMAL if token_id in by_id else UNUSED)
    pairs = content["model"]["merges"]
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in pairs],
        end=tokenizer.eos_token_id,
        padding=tokenizer.pad_token_id,
    )


def find_difference(content: dict[str, Any]) -> str | None:
    """Say in what a tokenizer differs from Qwen2's, None if in nothing.

    Parameters
    ----------
    content
        As tokenizer.json holds it.
    """
    model, added = content["model"], content["added_tokens"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
        return f"is not plain byte-level BPE but {model['type']}"
    if any(
        model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    ):
        return "marks or drops parts of words"
    if content.get("normalizer") != {"type": "NFC"}:
        return f"normalizes by {json.dumps(content.get('normalizer'))[:60]} instead of NFC"
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    split = {"behavior": "Isolated", "invert": False}
    patterns = [{"type": "Split", "pattern": {"Regex": text}, **split} for text in QWEN2_PATTERNS]
    last = steps[-1]
    byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if len(steps) != 2 or steps[0] not in patterns or not byte_level or last.get("use_regex", True):
        return "splits text by a rule of its own"
    for token in added:
        if any(token[key] for key in ("lstrip", "rstrip", "single_word")):
            return f"takes the space around {token['content']} for a part of it"
    return None
