"""Pages of figures: one self-contained HTML file."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

from pi05_lightning.files.local import write_text

_STYLE = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}td,th{padding:.2rem .8rem}"


class Section(NamedTuple):
    """A heading, paragraphs, a table whose first row are its headings, and figures as SVG."""

    heading: str
    texts: list[str] = []  # noqa: RUF012 - never written to
    rows: list[list[str]] = []  # noqa: RUF012
    figures: list[str] = []  # noqa: RUF012


def write_page(file: Path, title: str, sections: list[Section]) -> None:
    """Write the page as a whole."""
    parts = [f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{escape(title)}</h1>")
    for section in sections:
        parts.append(f"<h2>{escape(section.heading)}</h2>")
        parts += [f"<p>{escape(text)}</p>" for text in section.texts]
        if section.rows:
            head, *rows = section.rows
            cells = ["".join(f"<th align=left>{escape(cell)}</th>" for cell in head)]
            cells += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
            parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        parts += section.figures
    write_text(file, "\n".join(parts) + "\n")
