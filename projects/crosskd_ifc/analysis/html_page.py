"""A self-contained HTML page: text, tables and pictures inside it, no script, nothing fetched."""

import base64
import html
from typing import Any, List, Sequence

import cv2
import numpy as np

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1c2733; background: #f4f6f8;
  margin: 0; }
main { max-width: 1160px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 10px; }
section { background: #fff; border: 1px solid #dde3e9; border-radius: 8px; padding: 18px 20px;
  margin: 18px 0; }
p { margin: 6px 0; }
.note { color: #5b6a78; font-size: 13px; }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 14px; }
.number { background: #fff; border: 1px solid #dde3e9; border-radius: 8px; padding: 10px 16px;
  min-width: 110px; }
.number b { display: block; font-size: 22px; line-height: 1.2; }
.number span { color: #5b6a78; font-size: 12px; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid #e8edf1;
  vertical-align: top; overflow-wrap: anywhere; }
td.right, th.right { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { height: 9px; border-radius: 2px; margin: 3px 0; }
.bars { min-width: 300px; }
.ours { background: #2a78c2; }
.theirs { background: #b4bfca; }
img { max-width: 100%; height: auto; }
pre { background: #f4f6f8; padding: 10px; border-radius: 6px; font-size: 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.row { display: grid; gap: 6px; margin: 12px 0 2px; }
.row figure { margin: 0; }
.row img { width: 100%; display: block; border-radius: 4px; }
figcaption { font-size: 12px; color: #5b6a78; }
summary { cursor: pointer; }
"""


class Page:
    """Sections, one after the other."""

    def __init__(self, title: str, subtitle: str):
        self._title, self._parts = title, [f"<h1>{escape(title)}</h1><p class=note>{subtitle}</p>"]

    def add(self, title: str, *parts: str) -> None:
        """A section; parts are HTML."""
        self._parts.append(f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>")

    def add_numbers(self, numbers: Sequence[Sequence[str]]) -> None:
        """Big numbers, each (number, what it is)."""
        cells = [
            f"<div class=number><b>{escape(n)}</b><span>{escape(what)}</span></div>"
            for n, what in numbers
        ]
        self._parts.append(f"<div class=numbers>{''.join(cells)}</div>")

    def html(self) -> str:
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head>"
            f"<body><main>{''.join(self._parts)}</main></body></html>\n"
        )


def escape(text: Any) -> str:
    return html.escape(str(text))


def paragraph(text: str, *, note: bool = False) -> str:
    return f"<p{' class=note' if note else ''}>{escape(text)}</p>"


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str], *, numbers_from: int = 99) -> str:
    """A table; the columns from ``numbers_from`` on are aligned to the right."""

    def line(cells: Sequence[Any], tag: str) -> str:
        kinds = (" class=right" if i >= numbers_from else "" for i in range(len(cells)))
        found = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds))
        return f"<tr>{''.join(found)}</tr>"

    return f"<table>{line(headers, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def svg(text: str, what: str) -> str:
    """A drawing; as an image, so that the names inside it are its own."""
    return _image("image/svg+xml", text.encode(), what)


def picture(image: np.ndarray, what: str) -> str:
    """An (H, W, 3) RGB uint8 picture, as JPEG."""
    _, encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return _image("image/jpeg", encoded.tobytes(), what)


def picture_row(pictures: List[str], captions: Sequence[str]) -> str:
    """Pictures of :func:`picture` side by side."""
    figures = (
        f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        for image, caption in zip(pictures, captions)
    )
    style = f"grid-template-columns:repeat({len(pictures)},1fr)"
    return f'<div class=row style="{style}">{"".join(figures)}</div>'


def _image(kind: str, content: bytes, what: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(what)}" src="data:{kind};base64,{data}">'
