"""Pages of figures: one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pi05_lightning.evaluation.report.page import templates
from pi05_lightning.files.local import write_text


class PageSection(NamedTuple):
    """A heading, paragraphs, a table whose first row are its headings, and figures as SVG."""

    heading: str
    texts: list[str] = []  # noqa: RUF012 - never written to
    rows: list[list[str]] = []  # noqa: RUF012
    figures: list[str] = []  # noqa: RUF012


def write_page(file: Path, title: str, sections: list[PageSection]) -> None:
    """Write the page as a whole."""
    template = templates("pi05_lightning.experience").get_template("page.html.j2")
    write_text(file, template.render(title=title, sections=sections))
