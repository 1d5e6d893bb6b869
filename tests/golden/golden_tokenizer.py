"""Train the tiny byte-level BPE tokenizer of the golden checkpoint.

Same pipeline and special tokens as the Qwen tokenizers, a few hundred pieces instead of 151,643.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, Qwen2TokenizerFast

#: Added tokens in the order of the Qwen tokenizers, with their `special` flag.
ADDED_TOKENS: dict[str, bool] = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|box_start|>": True,
    "<|box_end|>": True,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_BPE_SIZE = 384

# The page prompt is repeated so that its words become single pieces: the published tokenizer
# spends 11 tokens on the prompt, and this one has to as well.
_CORPUS = ["user\n", "Describe", " the", " image"] * 64 + [
    "What is the total revenue of the third quarter in the annual report?",
    "Which region shows the highest growth of energy imports, and in which year?",
    "The table on the second page lists costs, margins and shares for each unit.",
    "Figure 3 plots the forecast against the measured values; the axis is logarithmic.",
    "Where does the author explain how the index was computed and what it leaves out?",
    "Der Bericht nennt die Größe der Anlage. Le café est près de la gare.",
]


def build_tokenizer() -> Qwen2TokenizerFast:
    """Train the tokenizer on a fixed corpus and return it with Qwen's added tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_BPE_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    trained = json.loads(bpe.to_str())["model"]

    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps(trained["vocab"]), encoding="utf-8")
        lines = "\n".join(" ".join(pair) for pair in trained["merges"])
        merges.write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
        tokenizer = Qwen2TokenizerFast(
            vocab_file=str(vocab),
            merges_file=str(merges),
            unk_token=None,
            bos_token=None,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            padding_side="left",
            model_max_length=262144,
            clean_up_tokenization_spaces=False,
            additional_special_tokens=[],
            added_tokens_decoder={
                _BPE_SIZE + offset: AddedToken(token, normalized=False, special=special)
                for offset, (token, special) in enumerate(ADDED_TOKENS.items())
            },
        )
    extra = [token for token, special in ADDED_TOKENS.items() if special][1:]
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    return tokenizer
