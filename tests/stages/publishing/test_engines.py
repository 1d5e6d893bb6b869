"""What engines read of a released folder: prompts equal the processor's, pages keep the limit."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from colqwen3.model.loading import load_model, load_processor
from colqwen3.release.provenance import METADATA
from stages.publishing.engines import sample_page, ship_for_engines

PAGE = [{"role": "user", "content": [{"type": "image"}]}]
TOO_MUCH = "Say what this page is about."


def text(*parts: str, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "text", "text": part} for part in parts]}]


@pytest.fixture(scope="module")
def tokenizer(released: Path) -> Any:
    return AutoTokenizer.from_pretrained(released)


def render(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("query", ["total of the invoice", "  spaces around \n", "", "Größe 漢字"])
def test_text_messages_give_the_processors_tokens(
    released: Path, tokenizer: Any, query: str
) -> None:
    expected = load_processor(released, 1280).process_texts([query])["input_ids"][0].tolist()
    assert render(tokenizer, text(query)) == expected
    assert render(tokenizer, [{"role": "user", "content": query}]) == expected


def test_page_messages_give_the_processors_tokens(released: Path, tokenizer: Any) -> None:
    processor = load_processor(released, 1280)
    expected = processor.process_images([Image.new("RGB", (96, 64))])["input_ids"][0].tolist()
    assert processor.image_token_id is not None
    for part in ({"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}):
        ids = render(tokenizer, [{"role": "user", "content": [part]}])
        place = ids.index(processor.image_token_id)
        assert ids[:place] + ids[place : place + 1] * 6 + ids[place + 1 :] == expected


@pytest.mark.parametrize(
    "messages",
    [
        PAGE + PAGE,
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TOO_MUCH}]}],
        [{"role": "user", "content": [{"type": "video"}]}],
        text("a query", role="system") + text("a query"),
        text("a query", role="assistant"),
        [],
    ],
)
def test_messages_that_are_neither_page_nor_text_are_rejected(
    tokenizer: Any, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises((TemplateError, ValueError)):
        render(tokenizer, messages)


def test_the_sources_own_templates_are_gone(released: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "copy"))
    (folder / "chat_template.json").write_text('{"chat_template": "conversation"}')
    (folder / "chat_template.jinja").write_text("conversation")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    changed = {**config, "chat_template": "conversation"}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    ship_for_engines(folder, 1280)
    assert not (folder / "chat_template.json").exists()
    assert json.loads((folder / "tokenizer_config.json").read_text()) == config
    loaded: Any = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == (released / "chat_template.jinja").read_text()


@pytest.mark.parametrize("limit", [1280, 64, 4])
def test_engines_keep_to_the_limit_of_visual_tokens(
    released: Path, tmp_path: Path, limit: int
) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "copy"))
    # as transformers 5 saves a processor: the image processor inside
    inside = json.loads((folder / "preprocessor_config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())
    inside = {**inside, "min_pixels": 1, "max_pixels": 1 << 30}
    (folder / "processor_config.json").write_text(
        json.dumps({**processor, "image_processor": inside})
    )
    ship_for_engines(folder, limit)
    page = Image.new("RGB", (1700, 2200), "white")
    expected = load_processor(folder, limit).process_images([page])["image_grid_thw"]
    images: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    grid = images([page], return_tensors="pt")["image_grid_thw"]
    assert torch.equal(grid, expected)
    assert limit * 0.5 <= int(grid.prod()) // 4 <= limit
    written = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    assert written["max_pixels"] == written["size"]["longest_edge"] == limit * 1024


# ---- The card's client, against a server that knows the template and the weights -----------------


@pytest.fixture
def server(released: Path, tokenizer: Any) -> Iterator[int]:
    """Serve ``/pooling`` as the card describes it, with transformers behind it."""
    model = load_model(released, torch.float32, torch.device("cpu"))
    images = load_processor(released, 1280).image_processor

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, body["task"], body["model"]) == (
                "/pooling",
                "token_embed",
                "colqwen3",
            )
            ids, pixels = render(tokenizer, body["messages"]), {}
            part = body["messages"][0]["content"][0]
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].split(",")[1])
                pixels = images([Image.open(io.BytesIO(data))], return_tensors="pt")
                place = ids.index(token := tokenizer.convert_tokens_to_ids("<|image_pad|>"))
                ids[place : place + 1] = [token] * (int(pixels["image_grid_thw"].prod()) // 4)
            with torch.inference_mode():
                row = torch.tensor([ids])
                vectors = model(
                    input_ids=row, attention_mask=torch.ones_like(row), **pixels
                ).embeddings[0]
            answer = json.dumps({"data": [{"data": vectors.tolist()}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    served = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served.server_port
    served.shutdown()
    served.server_close()


def test_the_cards_client_prints_the_expected_numbers(released: Path, server: int) -> None:
    card = (released / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[2].replace(":8000", f":{server}")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads((released / METADATA).read_text())["expected"]
    counts, query, page = done.stdout.splitlines()
    tokens, cells, score = counts.split()
    assert (int(tokens), int(cells)) == (expected["query_tokens"], expected["page_tokens"])
    assert int(cells) == 12 + 11  # of 32 x 32 pixels, and those of the prompt
    assert float(score) == pytest.approx(expected["maxsim"], abs=0.002)
    for line, name in ((query, "query_vector"), (page, "page_vector")):
        assert json.loads(line) == pytest.approx(expected[name], abs=0.0002)
        assert ", ".join(map(str, expected[name])) in card
    assert f"{expected['maxsim']:.2f}" in card


def test_the_sample_page_is_what_the_card_draws(released: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(), re.DOTALL)[2]
    (drawing,) = re.findall(r"^page = Image\.new.*?(?=^file = )", code, re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {}
    exec(f"from PIL import Image, ImageDraw\n{drawing}", scope)
    assert scope["page"].tobytes() == sample_page().tobytes()
