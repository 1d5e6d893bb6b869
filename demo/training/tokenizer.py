"""A small byte-level BPE tokenizer with the special tokens of Qwen."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from demo.drawing.text import Corpus, made_up_word, number

# The published model's split: words with their leading space, digits one by one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD = "<|endoftext|>"
AUGMENTATION = 10
PAGE_PREFIX = "<|im_start|>user\n<|vision_start|>"
PAGE_SUFFIX = "<|vision_end|>Describe the image.<|im_end|><|endoftext|>"


def train_tokenizer(corpus: Corpus, vocab_size: int, seed: int) -> Tokenizer:
    """Learn a byte-level BPE on the text that training pages are made of.

    Parameters
    ----------
    corpus : Corpus
        Where sentences and words come from.
    vocab_size : int
        Size with the special tokens, which take the highest ids as in Qwen.
    seed : int
        Seed of the made-up words and numbers.
    """
    rng = random.Random(seed)
    lines = list(corpus.sentences)
    # Title case and lists of names are common on pages and rare in docstrings.
    lines += [" ".join(rng.choices(corpus.words, k=6)).title() for _ in range(4000)]
    lines += [" ".join(made_up_word(corpus, rng) for _ in range(6)) for _ in range(3000)]
    lines += [" ".join(made_up_word(corpus, rng).title() for _ in range(6)) for _ in range(1000)]
    lines += [number(rng) for _ in range(2000)]
    lines += ["user\n", "Describe the image."] * 3000
    lines += ["What", "Which", "Who", "When", "Where", "How", "what", "who", "where"] * 300
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer as the publisher does: tokenizer.json and its two companions."""
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL
    }
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": PAD,
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    special = {
        "additional_special_tokens": list(SPECIAL[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": PAD,
    }
    for name, value in (("tokenizer_config", settings), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", "utf-8")
