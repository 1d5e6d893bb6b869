"""The model card: valid for the Hub, true to the metrics, and its code runs as it is printed."""

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from markdown_it import MarkdownIt

from colqwen3.system.errors import UserError
from stages.publishing.card import (
    card_data,
    describe_fallback,
    describe_method,
    describe_weights,
    licence_of,
    read_source_card,
    suits_vllm,
    write_card,
)
from stages.quantization.recipes import AnyRecipe, AutoRoundRecipe, EndToEnd, GptqRecipe, RtnRecipe
from tests.helpers.metrics import WITHIN_THE_LIMITS, quality

METRICS = quality(**WITHIN_THE_LIMITS)
WEIGHTS: Any = {"bits": 4, "group_size": 128, "sym": True}
FACTS: dict[str, Any] = {
    "recipe": "rtn-w4g128",
    "metrics": METRICS,
    "licence_files": [],
    "base_model": "owner/base",
    "title": "base-rtn",
    "bits": 3,
    "dataset": "some/pages",
    "measured_on": "7 pages of some/pages",
}


@pytest.fixture(scope="module")
def card(released: Path) -> Any:
    return ModelCard.load(released / "README.md")


def test_metadata_survive_the_librarys_own_reading(card: Any) -> None:
    data = card.data
    assert (data.base_model, data.base_model_relation) == ("demo/model", "quantized")
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert data.pipeline_tag == "visual-document-retrieval"
    assert {"colqwen3", "4-bit", "demonstration"} <= set(data.tags)
    # what the Hub reads results by: written again, it is the same
    block = yaml.safe_load(card.content.split("---")[1])
    assert eval_results_to_model_index(data.model_name, data.eval_results) == block["model-index"]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values["ndcg_at_5"] == METRICS["retrieval"]["ndcg_at_5"]["quantized"]
    assert all("demo/pages/evaluation" in result.dataset_name for result in data.eval_results)


def test_figures_are_those_of_the_metrics_and_say_of_what(card: Any) -> None:
    ndcg = METRICS["retrieval"]["ndcg_at_5"]
    for figure in (
        f"| nDCG@5 | {ndcg['original']:.4f} | {ndcg['quantized']:.4f} ",
        f"| {METRICS['pages']['cosine']['mean']:.5f} |",
        f"{METRICS['size']['files']['quantized']:,} instead of",
        "Measured on 126 pages and 252 queries of demo/pages/evaluation",
        "demonstration of 5,784,832 parameters, not for use",
        "rounding to nearest",
        "group size 128",
    ):
        assert figure in card.text
    assert not re.search(r"None|\{\{|\{%", card.content)


def test_code_of_the_card_runs_as_it_is_printed(released: Path, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(), re.DOTALL)
    assert len(code) == 4
    env = {key: value for key, value in os.environ.items() if key in ("PATH", "OMP_NUM_THREADS")}
    finished = subprocess.run(
        [sys.executable, "-c", "\n".join([*code[:2], code[3], "print(query_vectors[0].shape)"])],
        cwd=released, env={**env, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    first, second, third, fourth, alone = map(float, re.findall(r"\d+\.\d+", finished.stdout))
    assert first > second and third < fourth  # each query finds its page
    assert 0 < alone < first  # a blank page
    assert "torch.Size([" in finished.stdout  # of the runtime


@pytest.mark.parametrize("width", [128, 320])
@pytest.mark.parametrize("kind", ["auto_round", "auto_gptq"])
def test_the_card_says_where_the_folder_loads(tmp_path: Path, kind: str, width: int) -> None:
    expected = {"query": "a", "maxsim": 1.0, "query_vector": [0.5], "page_vector": [0.25]}
    facts = {
        **FACTS, "format": kind, "vector_width": width, "expected": expected,
        "transformers_versions": "5.0", "vllm_versions": "0.1", "suits_vllm": True,
        "runtime_speeds": {"2 pages": (0.5, 1.256)}, "runtime_losses": {"other model": (1.1, 1.04)},
    }  # fmt: skip
    write_card(tmp_path, {}, facts)
    lines = (tmp_path / "README.md").read_text().splitlines()
    text = " ".join(" ".join(lines).split())
    assert ("| speed, 2 pages | 0.50 | 1.26 |" in lines) == (kind == "auto_round")
    assert ("| loss, pages / queries: other model | 1 / 1 | 1.10 / 1.04 |" in lines) == (
        kind == "auto_round"
    )
    assert "transformers 5.0, vLLM 0.1" in text
    assert ("sentence-transformers 6.2.0, mteb" in text) == (kind == "auto_round")
    assert ("`colqwen3 export-colpali`" in text) == ((kind, width) == ("auto_round", 320))
    assert "computes with random weights without an error" in text
    assert "vllm serve ." in text and "Not for vLLM" not in text
    write_card(tmp_path, {}, {**facts, "suits_vllm": False})
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert "Not for vLLM" in text and "vllm serve" not in text and "vLLM 0.1" not in text
    assert "transformers 5.0" in text


@pytest.mark.parametrize("activations", [None, "int8"])
def test_the_results_are_a_table_and_say_how_the_model_was_served(
    tmp_path: Path, activations: str | None
) -> None:
    served = {"serving": {"activations": activations}} if activations else {}
    facts = {
        **FACTS, "format": "auto_round", "vector_width": 128, "transformers_versions": "5.0",
        "vllm_versions": "0.1", "suits_vllm": True, "metrics": {**METRICS, **served},
        "runtime_speeds": {}, "runtime_losses": {},
        "expected": {"query": "a", "maxsim": 1.0, "query_vector": [0.5], "page_vector": [0.25]},
    }  # fmt: skip
    write_card(tmp_path, {}, facts)
    text = (tmp_path / "README.md").read_text()
    assert "\n\n| | base model | this model |\n" in text  # else it is no table
    assert ("with int8 activations" in text) == (activations == "int8")
    assert ("dense weights" in text) == (activations is None)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ({"language_model": {"4": 28}, "token_embeddings": 16}, True),
        ({"language_model": {"3": 28}, "token_embeddings": 16}, False),
        ({"language_model": {"8": 28}, "token_embeddings": 16}, False),
        ({"language_model": {"4": 8, "8": 20}, "token_embeddings": 16}, False),
        ({"language_model": {"4": 28}, "token_embeddings": 8}, False),
        ({"language_model": {"4": 28}, "token_embeddings": 16, "vision_mlp": {"8": 4}}, False),
    ],
)
def test_vllm_is_named_for_what_it_was_seen_to_run(bits: dict[str, Any], expected: bool) -> None:
    assert suits_vllm(bits) == expected


def test_licence_language_and_tags_come_from_the_source(tmp_path: Path) -> None:
    source = {
        "license": "other",
        "license_name": "mine",
        "language": "de",
        "tags": ["x", "colqwen3"],
    }
    data: Any = card_data(source, FACTS)
    assert (data.license, data.license_name, data.language) == ("other", "mine", "de")
    assert data.tags.count("colqwen3") == 1
    assert {"x", "3-bit"} <= set(data.tags)
    silent: Any = card_data({"tags": "no list"}, FACTS)
    assert silent.license == "unknown"
    assert read_source_card(tmp_path) == {}


def test_damaged_source_card_and_missing_figures_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n- [\n---\n")
    with pytest.raises(UserError, match=r"README\.md: has a damaged metadata block"):
        read_source_card(tmp_path)
    with pytest.raises(UserError, match=r"lacks a figure of the card \('retrieval'\)"):
        write_card(tmp_path, {}, {**FACTS, "metrics": {}})


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            RtnRecipe(method="rtn", calibration="none", **WEIGHTS),
            "rounding to nearest, without data",
        ),
        (GptqRecipe(method="gptq", calibration="some", **WEIGHTS), "GPTQ"),
        (
            GptqRecipe(method="gptq", calibration="some", hessian="model", **WEIGHTS),
            "GPTQ by the whole model",
        ),
        (
            AutoRoundRecipe(
                method="autoround", calibration="some", lr=0.01, iters=20, seed=7, **WEIGHTS
            ),
            "AutoRound, 20 iterations, seed 7",
        ),
        (
            GptqRecipe(method="gptq", calibration="some", end_to_end=EndToEnd(steps=9), **WEIGHTS),
            "GPTQ, then 9 steps end to end",
        ),
    ],
)
def test_every_method_has_words(recipe: AnyRecipe, words: str) -> None:
    assert describe_method(recipe.model_dump()) == words


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (True, "GPTQ, then 9 steps end to end"),
        (False, "GPTQ; 9 steps end to end did not help and are not in it"),
    ],
)
def test_steps_that_were_not_kept_are_not_claimed(kept: bool, words: str) -> None:
    values = {"method": "gptq", "end_to_end": {"steps": 9}}
    assert describe_method(values, {"kept": kept, "loss": {}}) == words


TOWER = {"vision_attention": {"8": 12}, "vision_mergers": {"8": 6}}


@pytest.mark.parametrize(
    ("bits", "quantized", "kept"),
    [
        (
            {"language_model": {"4": 28}, "token_embeddings": 16},
            "the linears of its language model in 4 bits",
            "Vision tower, token embeddings and projection are",
        ),
        (
            {"language_model": {"4": 28}, "token_embeddings": 8, **TOWER},
            "the linears of its language model in 4 bits; the attention of its vision tower, its "
            "mergers and its token embeddings in 8 bits",
            "MLPs of its vision tower and projection are",
        ),
        (
            {"language_model": {"4": 28}, "token_embeddings": 4, "vision_mlp": {"4": 12}},
            "the linears of its language model, the MLPs of its vision tower and its token "
            "embeddings in 4 bits",
            "Attention of its vision tower, mergers and projection are",
        ),
        (
            {"language_model": {"3": 20, "4": 6, "8": 2}, "token_embeddings": 16, **TOWER},
            "the linears of its language model in 3 (20 of 28), 4 (6 of 28), 8 (2 of 28) bits; the "
            "attention of its vision tower and its mergers in 8 bits",
            "MLPs of its vision tower, token embeddings and projection are",
        ),
        (
            {"language_model": {"4": 28}, "token_embeddings": 16, "vision_mlp": {"4": 2, "8": 10}},
            "the linears of its language model in 4 bits; the MLPs of its vision tower in 4 (2 of "
            "12), 8 (10 of 12) bits",
            "Attention of its vision tower, mergers, token embeddings and projection are",
        ),
        (
            {
                "language_model": {"4": 28},
                "token_embeddings": 8,
                "vision_mlp": {"8": 12},
                **TOWER,
            },
            "the linears of its language model in 4 bits; its vision tower and its token embeddings "
            "in 8 bits",
            "Projection is",
        ),
    ],
)
def test_the_card_says_what_is_in_how_many_bits_and_what_is_as_it_was(
    tmp_path: Path, bits: dict[str, Any], quantized: str, kept: str
) -> None:
    said, unquantized = describe_weights(bits)
    assert said == quantized
    assert unquantized == kept
    facts = {"quantized": said, "unquantized": unquantized, "group_size": 32, "layers": 47}
    write_card(tmp_path, {}, {**FACTS, **facts})
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert f"owner/base with {quantized} (group size 32, symmetric; activations stay" in text
    assert f"{kept} the base model's own bytes." in text
    assert f"| weights | {quantized}; group size 32, symmetric; 47 modules;" in text


def test_a_fallback_is_said() -> None:
    assert describe_fallback({"ran": "a", "values": {}}) is None
    said = describe_fallback({"ran": "b", "instead_of": "a", "because": "out of memory"})
    assert said is not None
    assert all(part in said for part in ("`b`", "`a`", "out of memory"))


HOSTILE = (
    "<script>alert(1)</script> [click](https://evil.example) `code` **bold** | cell\n# heading"
)


@pytest.mark.parametrize(
    "source",
    [
        {"license": HOSTILE},
        {
            "license": ["mit", HOSTILE],
            "license_name": HOSTILE,
            "license_link": "javascript:alert(1)",
        },
        {"license": {"a": HOSTILE}, "language": [HOSTILE, "de"], "tags": [HOSTILE, 7, "x"]},
        {"license": datetime.date(2026, 1, 1), "language": HOSTILE},
    ],
)
def test_nothing_of_the_sources_card_becomes_markup_of_ours(
    tmp_path: Path, source: dict[str, Any]
) -> None:
    write_card(tmp_path, source, {**FACTS, "licence_files": [f"LICENSE{HOSTILE}.txt"]})
    text = (tmp_path / "README.md").read_text()
    assert "javascript:" not in text
    rendered = MarkdownIt().enable("table").render(text.split("---", 2)[2])
    assert "<script" not in rendered
    assert 'evil.example"' not in rendered  # no link to it
    assert "<strong>bold" not in rendered
    assert "<h1>heading" not in rendered
    data: Any = ModelCard.load(tmp_path / "README.md").data
    assert data.license in ("unknown", "mit")
    assert licence_of(source) in (None, "mit")
    assert HOSTILE not in [data.language, *(data.tags or [])]


def test_the_reason_of_a_fallback_stays_text() -> None:
    said = describe_fallback({"ran": "b", "instead_of": "a", "because": HOSTILE})
    rendered = MarkdownIt().render(str(said))
    assert "<script" not in rendered
    assert "<a " not in rendered
    assert "alert(1)" in rendered
