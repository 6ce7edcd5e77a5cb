"""A run's figures as tables for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from pi05_lightning.report.page import overall
from pi05_lightning.report.run import Metrics, Success


def metrics_table(metrics: Metrics) -> Table:
    table = Table("modality", "metric", "value", title="validation", title_justify="left", box=SIMPLE_HEAD)
    for modality, values in metrics.items():
        for number, (metric, value) in enumerate(values.items()):
            table.add_row("" if number else modality, metric, "not a number" if value is None else f"{value:.4g}")
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
