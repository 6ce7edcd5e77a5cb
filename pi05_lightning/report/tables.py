"""A run's figures as tables for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pi05_lightning.report.page import overall
from pi05_lightning.report.run import Metrics, Success


def metrics_table(metrics: Metrics) -> Table:
    table = Table("modality", "metric", "value", title="validation", title_justify="left", box=SIMPLE_HEAD)
    for modality, values in metrics.items():
        for number, (metric, value) in enumerate(values.items()):
            table.add_row("" if number else modality, metric, "not a number" if value is None else f"{value:.4g}")
    return table


def success_table(success: Success) -> Table:
    table = Table("task", title="success on held-out initial states", title_justify="left", box=SIMPLE_HEAD)
    for mode in success:
        table.add_column(mode, justify="right", no_wrap=True)
    for task in next(iter(success.values())):
        table.add_row(task, *(f"{by_task[task][0]}/{by_task[task][1]}" for by_task in success.values()))
    table.add_section()
    table.add_row(
        "all [95 %]", *(f"{x['rate']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for x in overall(success).values())
    )
    return table
