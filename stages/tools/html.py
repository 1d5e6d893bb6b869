"""HTML of the report: every text is escaped, every picture inlined, nothing is fetched."""

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; }
caption { caption-side: bottom; text-align: left; color: #666; font-size: .85rem; padding-top: .4rem; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .8rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #888; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
"""
# the browser itself refuses whatever is not in the file
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: Sequence[str]) -> str:
    """Return a whole HTML file; `parts` are markup, `title` is text."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>\n</head>\n<body>",
    )
    return "\n".join([*head, *parts, "</body>\n</html>\n"])


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Return text whose line breaks are kept."""
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table whose first column heads the rows."""
    lines = [f"<table>\n<caption>{escape(caption)}</caption>"]
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines.append(f"<thead><tr>{cells}</tr></thead>\n<tbody>")
    for first, *others in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in others)
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody>\n</table>"])


def image(kind: str, data: bytes, text: str, title: str) -> str:
    """Return an inlined picture of MIME type image/`kind`."""
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(text)}" title="{escape(title)}">'
