"""Pages of figures: one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from pi05_lightning.files.local import write_text


class PageSection(NamedTuple):
    """A heading, paragraphs, a table whose first row are its headings, and figures as SVG."""

    heading: str
    texts: list[str] = []  # noqa: RUF012 - never written to
    rows: list[list[str]] = []  # noqa: RUF012
    figures: list[str] = []  # noqa: RUF012


def write_page(file: Path, title: str, sections: list[PageSection]) -> None:
    """Write the page as a whole."""
    environment = Environment(
        loader=PackageLoader("pi05_lightning.experience", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    write_text(file, environment.get_template("page.html.j2").render(title=title, sections=sections))
