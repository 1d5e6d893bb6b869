"""What training pages ask for, and losses that punish no right answer."""

import random

import pytest
import torch
from tokenizers import Tokenizer

from demo.drawing.sheet import Pairs, Sheet, Style, Table
from demo.drawing.text import Corpus
from demo.training.network import Retriever, Shape, published_config
from demo.training.samples import Difficulty, PageMaker, assemble
from demo.training.tokenizer import AUGMENTATION
from demo.training.train import Losses, Muon, orthogonal

WORDS = ["harbour", "invoice", "kitchen", "ledger", "meadow", "orchard", "pencil", "quarter"]
SENTENCES = ["The harbour ledger lists 42 boats.", "An orchard needs 17 pencils a quarter."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file("demo/model/tokenizer.json")


@pytest.fixture(scope="module")
def maker(tokenizer: Tokenizer) -> PageMaker:
    chain = {"^^^": ["h"], "^^h": ["a"], "^ha": ["r"], "har": ["b"], "arb": ["$"]}
    return PageMaker(Corpus(SENTENCES, WORDS, [], [], chain), [""], tokenizer, 4)


def sheet(rows: list[tuple[str, str]]) -> Sheet:
    page = Sheet(256, 128, Style(size=13))
    assert page.add(Pairs(rows))
    return page


def test_pages_with_all_words_of_a_query_are_no_wrong_answers(tokenizer: Tokenizer) -> None:
    pages = [sheet([("Berth", "17")]), sheet([("Berth", "18")]), sheet([("Bed", "17 berth")])]
    asked = [(0, "berth 17"), (1, "berth 18"), (0, "which berth"), (1, "nothing here")]
    batch = assemble(pages, asked, tokenizer, 32)
    assert batch.also.tolist() == [
        [True, False, True],
        [False, True, False],
        [True, True, True],
        [True, True, True],
    ]


def test_places_of_tokens_lie_where_their_word_stands(tokenizer: Tokenizer) -> None:
    pages = [sheet([("Kitchen", "17")]), sheet([("Ledger", "18"), ("Pencil", "kitchen")])]
    batch = assemble(pages, [(1, "kitchen")], tokenizer, 32)
    cells = 8 * 4
    # The value's word begins right of its key, on the second line of the second page.
    line = pages[1].words[-1]
    first, last = int(line.edges[0] // 32), int(line.edges[-1] // 32)
    row = int((line.top + line.bottom) / 2 // 32)
    expected = {cells + row * 8 + column for column in range(first, last + 1)}
    assert set(batch.here[:, 1].tolist()) <= expected
    same = set(batch.same[:, 1].tolist())
    assert expected <= same
    assert any(cell < cells for cell in same)  # the other page's copy
    assert batch.words == 1
    assert set(batch.word.tolist()) == {0}


def test_twins_share_the_look_and_differ_in_numbers(maker: PageMaker) -> None:
    level = Difficulty(12, 14, 1, 1, 448, 576, 1.0, twins=1.0)
    maker._drawn = None
    first, twin = maker.page(level), maker.page(level)
    assert twin.style == first.style
    texts = [word.text for word in first.words], [word.text for word in twin.words]
    pairs = list(zip(*texts, strict=False))
    assert sum(one == other for one, other in pairs) > 0.5 * len(pairs)
    figures = [one != other for one, other in pairs if one.isdigit() and other.isdigit()]
    assert sum(figures) > 0.5 * len(figures) > 0


def test_rows_of_a_table_are_lines_of_a_query(maker: PageMaker) -> None:
    page = Sheet(448, 128, Style(size=13))
    page.add(Table(["Cargo", "Crates"], [["timber", "417"], ["wool", "982"]]))
    maker.rng = random.Random(1)
    asked = {maker.query(page).lower() for _ in range(200)}
    assert any("timber 417" in text for text in asked)
    assert not any("wool 417" in text and "timber" not in text for text in asked if " " in text)


def small_model(tokenizer: Tokenizer) -> Retriever:
    torch.manual_seed(0)
    return Retriever(published_config(Shape(), tokenizer), tokenizer)


def test_rank_loss_leaves_out_right_pages_and_a_batch_does_not_meet_itself(
    tokenizer: Tokenizer,
) -> None:
    model = small_model(tokenizer)
    losses = Losses(Shape().vision_hidden)
    alike = [sheet([("Berth", "17")]), sheet([("Berth", "17")])]
    batch = assemble(alike, [(0, "berth 17")], tokenizer, 32)
    assert batch.ids.shape[1] == batch.mask.sum() > AUGMENTATION
    parts = losses(model, batch, 8)
    # One query, no wrong page: nothing to lose, and no NaN where all others are left out.
    assert parts["rank"].item() == pytest.approx(0.0, abs=1e-6)
    again = losses(model, batch, 8)
    assert again["rank"].item() == pytest.approx(0.0, abs=1e-6)
    batch.number = 1
    later = losses(model, batch, 8)  # its own pages, now under another number
    assert later["rank"].item() > 0.1
    assert all(torch.isfinite(value) for value in later.values())


def test_batch_without_queries_only_reads(tokenizer: Tokenizer) -> None:
    losses = Losses(Shape().vision_hidden)
    batch = assemble([sheet([("Berth", "17")])], [], tokenizer, 32)
    assert set(losses(small_model(tokenizer), batch, 8)) == {"read", "letters"}


def test_orthogonal_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    for matrix, alone in zip(matrices, orthogonal(matrices), strict=True):
        torch.testing.assert_close(orthogonal(matrix), alone)


def test_muon_updates_matrices_of_one_shape_each_by_its_own_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    gradients = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    together = [torch.nn.Parameter(weight.clone()) for weight in start]
    for weight, gradient in zip(together, gradients, strict=True):
        weight.grad = gradient
    Muon(together, 0.1, 0.01).step()
    for weight, before, gradient in zip(together, start, gradients, strict=True):
        size = 0.2 * 6**0.5
        expected = before * (1 - 0.1 * 0.01) - 0.1 * size * orthogonal(gradient * 1.95)
        torch.testing.assert_close(weight.detach(), expected)
