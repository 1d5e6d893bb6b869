"""llama.cpp gives the ids that the model was trained on, for any text."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from colqwen3.gguf.tokenizer import find_difference, read_vocabulary
from tests.colqwen3.gguf.conftest import DEMO
from tests.helpers.refusal import refusal

pytest.importorskip("gguf")
run_gguf = pytest.importorskip("colqwen3.gguf.run_gguf", exc_type=ImportError)
Exporter = Callable[..., Path]

PIECES = (
    "total", "The", " of", "can't", "WE'LL", "I'M", "42", "3.14", "\n", "\r\n", "\n\n\n", "  ", "\t",
    "\u00a0", "\u3000", "\u200b", "\u200d", "\ufeff", "é", "e\u0301", "A\u030a", "\u0301", "\u1100\u1161",
    "각", "ﬁ", "Ω", "\u212b", "日本語", "ไทย", "हिन्दी", "عربي", "עברית", "😀", "👩\u200d👧", "🇫🇷", "\U0001d518",
    "ǅ", "İ", "ß", "½", "٣", "²", "_", "-", "...", "!?", "$", "€", "#", "<", ">", "<|", "|>",
    "<|endoftext|>", "<|image_pad|>", "<|im_start|>", "\x00", "\x1f", "\u2028", "\u0085",
)  # fmt: skip


def random_text(generator: random.Random) -> str:
    """Pieces that split in odd ways, and characters from all planes."""
    parts = []
    for _ in range(generator.randrange(1, 12)):
        if generator.random() < 0.6:
            parts.append(generator.choice(PIECES))
        else:
            point = generator.randrange(1, generator.choice((0x80, 0x800, 0x10000, 0x20000)))
            parts.append("" if 0xD800 <= point < 0xE000 else chr(point))
    return "".join(parts)


TEXTS = [random_text(random.Random(seed)) for seed in range(4000)]


@pytest.mark.parametrize("name", ["demo", "other"])
def test_four_thousand_texts_have_the_ids_of_transformers(
    exported: Exporter, models: Callable[[str], Path], name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models(name))
    ours = run_gguf.Embedder(exported(name), 1)
    expected = tokenizer(TEXTS, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    wrong = [text for text, ids in zip(TEXTS, expected, strict=True) if ours.tokenize(text) != ids]
    assert wrong == []
    prompt = run_gguf.BEFORE + "<|image_pad|>" + run_gguf.AFTER
    assert ours.tokenize(prompt, special=True) == tokenizer(prompt)["input_ids"]


def test_every_row_of_the_embeddings_has_a_token() -> None:
    known = read_vocabulary(DEMO, 2048)
    padded = read_vocabulary(DEMO, 2100)
    assert padded.tokens[:2048] == known.tokens
    assert padded.types[2048:] == [5] * 52
    assert len(set(padded.tokens)) == 2100
    assert [known.tokens[known.padding], known.tokens[known.end or 0]] == [
        "<|endoftext|>",
        "<|im_end|>",
    ]
    assert [known.types[2034], known.types[64]] == [3, 1]
    assert "tokenizer has 2048 tokens, the model 2000" in refusal(read_vocabulary, DEMO, 2000)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "model"))
    (folder / name).write_text("{" if name == "tokenizer.json" else "[]")
    assert "tokenizer" in refusal(read_vocabulary, folder, 2048)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(read_vocabulary, folder, 2048)


CONTENT: dict[str, Any] = json.loads((DEMO / "tokenizer.json").read_text())


def test_the_tokenizer_itself_differs_in_nothing() -> None:
    assert find_difference(CONTENT) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(normalizer=None), "instead of NFC"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "instead of NFC"),
        (lambda c: c["model"].update(type="Unigram"), "not plain byte-level BPE"),
        (lambda c: c["model"].update(ignore_merges=True), "not plain byte-level BPE"),
        (lambda c: c["model"].update(end_of_word_suffix="</w>"), "parts of words"),
        (lambda c: c.update(pre_tokenizer=None), "a rule of its own"),
        (
            lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+"),
            "a rule of its own",
        ),
        (
            lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "a rule of its own",
        ),
        (lambda c: c["added_tokens"][3].update(lstrip=True), "takes the space around"),
    ],
)
def test_another_kind_of_tokenizer_is_found(
    change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    content = copy.deepcopy(CONTENT)
    change(content)
    assert reason in (find_difference(content) or "")
