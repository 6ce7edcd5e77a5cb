"""Tables for the terminal, and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from pi05_lightning.evaluation.report.metrics import (
    OTHER_HEADS,
    QUESTIONS,
    Metrics,
    is_empty,
    number,
    ordered,
    sections,
)


def table_of(title: str, labels: Iterable[str | Column], figures: Iterable[str] = (), **options: Any) -> Table:
    """An empty table: columns of labels, then columns of figures; options as `rich.table.Table` has them."""
    columns = [*labels, *(Column(heading, justify="right", no_wrap=True) for heading in figures)]
    options = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), **options}
    return Table(*columns, title=escape(title), title_justify="left", **options)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown. Its cells are in Markdown too; they may have bars and line breaks."""
    return "\n".join([_markdown_row(heads), f"|{'---|' * len(heads)}", *map(_markdown_row, rows)])


def _markdown_row(cells: Iterable[Any]) -> str:
    texts = (re.sub(r"(?<!\\)\|", r"\\|", str(cell)).replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"


def shown_option(value: Any) -> str:
    """An option's value, for a table."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, bool | None):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)


def metrics_tables(metrics: Metrics, part: str = "validation") -> list[Table]:
    """Rows are modalities and datasets; 80 columns wide; a second table for heads beside π0.5's own, if there are any.

    part: what was measured.
    """
    parts = sections(metrics)
    others = parts.pop(OTHER_HEADS, None)
    width = max((len(section.columns) for section in parts.values()), default=0)
    figures = [Column(justify="right", min_width=5) for _ in range(width)]
    # a box's edges are what makes 80 columns too few
    table = table_of(part, [Column(no_wrap=True), *figures], show_header=False, box=None, pad_edge=False)
    for title, section in parts.items():
        table.add_row(title, *section.columns.values(), style="bold")
        for name in section.rows:
            cells = _cells(metrics[name], section.columns)
            table.add_row(name, *(["none", *cells[1:]] if is_empty(metrics[name]) else cells))
        table.add_row()
    empty = [name for name in ordered(metrics) if is_empty(metrics[name])]
    if empty:
        table.caption = f"none: there are no {part} samples of {', '.join(empty)}"
        table.caption_justify = "left"
    if others is None:
        return [table]
    second = table_of(OTHER_HEADS, [""], others.columns.values())
    for name in others.rows:
        second.add_row(name, *_cells(metrics[name], others.columns))
    return [table, second]


def questions_table(subset: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each question that was asked of a subset."""
    table = table_of(f"{subset}, by question", ["question"], QUESTIONS.values())
    for question, values in rows.items():
        table.add_row(escape(question), *_cells(values, QUESTIONS))
    return table


def _cells(values: Mapping[str, float | None], columns: Iterable[str]) -> list[str]:
    return [number(values[metric]) if metric in values else "–" for metric in columns]
