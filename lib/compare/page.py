"""The report of a comparison as one HTML page that contains all its images."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from lib.compare.gallery import Example, Section
from lib.compare.table import Row, cells, method

SIDE = 320  # pixels of the longer side of the examples' images
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 16px; font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; }
h1 { font-size: 1.5rem; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 36px 0 8px; border-top: 1px solid #d7d7d7; padding-top: 16px; }
h3 { font-size: 1rem; margin: 16px 0 4px; }
p, figcaption, .note { color: #555; font-size: .9rem; margin: 4px 0 12px; max-width: 75ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 6px; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600; }
tr.reference td { background: #f3f6fa; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.charts img { width: 100%; max-width: 640px; }
article { border-bottom: 1px solid #e4e4e4; padding: 12px 0; }
article p { margin: 0 0 6px; color: #1a1a1a; font-size: 1rem; }
.cells { display: grid; gap: 8px; grid-template-columns: repeat(auto-fill, minmax(min(46%, 150px), 1fr)); }
figure { margin: 0; line-height: 1.3; font-size: .8rem; overflow-wrap: anywhere; }
figure img { width: 100%; max-width: 320px; display: block; }
figure i { display: inline-block; width: 10px; height: 10px; margin-right: 4px; }
"""


def make_page(
    rows: Sequence[Row], reference: str, charts: Mapping[str, Mapping[str, bytes]], sections: Sequence[Section]
) -> str:
    """Return the page.

    Args:
        rows: of the table.
        reference: name of the model that the others are compared with.
        charts: PNG files by title, below their headings.
        sections: of the gallery.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    body = [f"<h1>Comparison of {len(models)} models</h1>", f"<p>{_text(', '.join(models))}</p>"]
    for split in dict.fromkeys(row.split for row in rows):
        body += [f"<h3>{_text(split)}</h3>", _table([row for row in rows if row.split == split], reference)]
    body.append(f"<p>{_text(method(rows, reference))}</p>")
    for heading, images in charts.items():
        tags = [f'<img alt="{_text(title)}" src="{_uri(data, "png")}">' for title, data in images.items()]
        body += [f"<h2>{_text(heading)}</h2>", f'<div class="charts">{"".join(tags)}</div>'] if tags else []
    for section in sections:
        body += [
            f"<h2>{_text(section.title)}</h2>",
            "<p>Chosen by the mean over the seeds; masks of the first seed.</p>",
        ]
        body += map(_article, section.examples)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>Comparison: {_text(', '.join(models))}</title>"
    lines = ["<!DOCTYPE html>", f'<html lang="en"><head>{head}{title}<style>{STYLE}</style></head><body>']
    return "\n".join([*lines, *body, "</body></html>", ""])


def _text(text: str) -> str:
    return html.escape(text)


def _uri(data: bytes, file_format: str) -> str:
    return f"data:image/{file_format};base64,{base64.b64encode(data).decode()}"


def _table(rows: Sequence[Row], reference: str) -> str:
    """Return the rows of a split as a table, without the column of the split."""
    header, *body = cells(rows)
    lines = [_row("th", header[1:])]
    lines += [_row("td", row[1:], "reference" if row[1] == reference else "") for row in body]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _row(tag: str, texts: Iterable[str], name: str = "") -> str:
    return f'<tr class="{name}">{"".join(f"<{tag}>{_text(text)}</{tag}>" for text in texts)}</tr>'


def _article(example: Example) -> str:
    figures = [_figure(example.image, "image")]
    for cell in example.cells:
        color = f'<i style="background: rgb{cell.color}"></i>'
        figures.append(_figure(cell.image, f"{color}{_text(cell.title)} {_text(cell.score)}"))
    text = f'<p>“{_text(example.sentence)}” <span class="note">{_text(example.note)}</span></p>'
    return f'<article>{text}<div class="cells">{"".join(figures)}</div></article>'


def _figure(image: Image.Image, caption: str) -> str:
    """Return an image as JPEG with a caption, which is HTML."""
    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=85)
    return f'<figure><img alt="" loading="lazy" src="{_uri(file.getvalue(), "jpeg")}">{caption}</figure>'
