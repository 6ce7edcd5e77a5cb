"""A run's figures as tables for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from pi05_lightning.evaluation.report.metrics import SECTIONS, Metrics, is_empty, number, ordered, section_rows
from pi05_lightning.evaluation.statistics import Success, overall


def metrics_table(metrics: Metrics) -> Table:
    """Rows are modalities and datasets; 80 columns wide."""
    width = max(len(columns) for columns in SECTIONS.values())
    table = Table(
        Column(no_wrap=True),
        *(Column(justify="right", min_width=5) for _ in range(width)),
        title="validation",
        title_justify="left",
        show_header=False,
        box=None,  # whose columns' edges are what makes 80 too few
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
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
        table.caption = f"none: there are no validation samples of {', '.join(empty)}"
        table.caption_justify = "left"
    return table


def success_table(success: Success) -> Table:
    table = Table(
        Column("task", no_wrap=True),
        title="success on held-out initial states",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # five modes fit into 80 columns
        pad_edge=False,
    )
    for mode in success:
        table.add_column(mode.replace("_", "\n"), justify="right", no_wrap=True)
    for task in next(iter(success.values())):
        table.add_row(task, *(f"{by_task[task][0]}/{by_task[task][1]}" for by_task in success.values()))
    table.add_section()
    rows = overall(success).values()
    table.add_row("all", *(f"{row['rate']:.2f}" for row in rows))
    table.add_row("95 %", *(f"{row['low']:.2f}–{row['high']:.2f}" for row in rows))
    return table
