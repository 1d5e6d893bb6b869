import base64
from html.parser import HTMLParser

from stages.tools.html import document, heading, image, paragraph, preformatted, table

HOSTILE = "<img src=x onerror='alert(1)'>\"&lt;"


class Reader(HTMLParser):
    """Collects the tags with their attributes, and the text of each."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_text_is_escaped() -> None:
    made = [
        heading(HOSTILE),
        paragraph(HOSTILE),
        preformatted(HOSTILE),
        table([HOSTILE], [[HOSTILE, HOSTILE]], HOSTILE),
    ]
    read = Reader("".join(made))
    assert read.texts.count(HOSTILE) == 7
    assert "img" not in {tag for tag, _ in read.tags}
    title = Reader(document(HOSTILE, []))
    assert HOSTILE in title.texts


def test_a_picture_is_inlined_with_its_text() -> None:
    ((tag, attributes),) = Reader(image("png", b"\x89PNG\xff", HOSTILE, HOSTILE)).tags
    assert tag == "img"
    assert attributes.keys() == {"src", "alt", "title"}
    kind, _, data = str(attributes["src"]).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == b"\x89PNG\xff"
    assert attributes["alt"] == attributes["title"] == HOSTILE


def test_a_document_forbids_the_browser_to_fetch() -> None:
    read = Reader(document("title", [paragraph("text")]))
    (policy,) = [a for tag, a in read.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy["content"]).startswith("default-src 'none';")
    assert "http:" not in str(policy["content"])
