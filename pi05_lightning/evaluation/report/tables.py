"""Tables for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from pi05_lightning.evaluation.report.metrics import (
    QUESTIONS,
    SECTIONS,
    Metrics,
    is_empty,
    number,
    ordered,
    section_rows,
)


def table_of(title: str, labels: Iterable[str | Column], figures: Iterable[str] = (), **options: Any) -> Table:
    """An empty table: columns of labels, then columns of figures; options as `rich.table.Table` has them."""
    columns = [*labels, *(Column(heading, justify="right", no_wrap=True) for heading in figures)]
    options = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), **options}
    return Table(*columns, title=escape(title), title_justify="left", **options)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown. Texts of cells may have bars and line breaks."""
    return "\n".join([_markdown_row(heads), f"|{'---|' * len(heads)}", *map(_markdown_row, rows)])


def _markdown_row(cells: Iterable[Any]) -> str:
    texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"


def shown_option(value: Any) -> str:
    """An option's value, for a table."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, bool | None):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)


def metrics_table(metrics: Metrics, part: str = "validation") -> Table:
    """Rows are modalities and datasets; 80 columns wide. part: what was measured."""
    width = max(len(columns) for columns in SECTIONS.values())
    figures = [Column(justify="right", min_width=5) for _ in range(width)]
    # a box's edges are what makes 80 columns too few
    table = table_of(part, [Column(no_wrap=True), *figures], show_header=False, box=None, pad_edge=False)
    for section, columns in SECTIONS.items():
        names = section_rows(metrics, section)
        if not names:
            continue
        table.add_row(section, *columns.values(), style="bold")
        for name in names:
            values = metrics[name]
            cells = [number(values[metric]) if metric in values else "–" for metric in columns]
            table.add_row(name, *(["none", *cells[1:]] if is_empty(values) else cells))
        table.add_row()
    empty = [name for name in ordered(metrics) if is_empty(metrics[name])]
    if empty:
        table.caption = f"none: there are no {part} samples of {', '.join(empty)}"
        table.caption_justify = "left"
    return table


def questions_table(subset: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each question that was asked of a subset."""
    table = table_of(f"{subset}, by question", ["question"], QUESTIONS.values())
    for question, values in rows.items():
        table.add_row(escape(question), *(number(values[metric]) if metric in values else "–" for metric in QUESTIONS))
    return table
