"""Figures of the page, as SVG text."""

from __future__ import annotations

import io
from collections import defaultdict
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from pi05_lightning.report.run import Curve, Success
from pi05_lightning.report.statistics import wilson_interval

# Okabe and Ito's palette, told apart with any colour vision
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
MODE_LABELS = {
    "policy": "policy, subtask first",
    "flat": "policy, task only",
    "mean_replay": "mean trajectory",
    "random": "random actions",
    "expert": "scripted expert",
}


def success_bars(success: Success) -> str:
    """Success rate per task and mode with its 95 % Wilson interval, and over all tasks."""
    tasks = list(next(iter(success.values())))
    groups = [*tasks, "all tasks"]
    figure = Figure(figsize=(max(7.0, 1.6 * len(groups)), 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(success)
    for number, (mode, by_task) in enumerate(success.items()):
        counts = [tuple(by_task[task]) for task in tasks]
        counts.append((sum(s for s, _ in counts), sum(n for _, n in counts)))
        rates = np.array([successes / trials for successes, trials in counts])
        intervals = np.array([wilson_interval(*count) for count in counts])
        error = np.abs(intervals.T - rates)
        place = np.arange(len(groups)) + (number - (len(success) - 1) / 2) * width
        color = COLORS[number % len(COLORS)]
        axes.bar(
            place, rates, 0.9 * width, yerr=error, color=color, label=MODE_LABELS.get(mode, mode), ecolor="#444444"
        )
    axes.axvline(len(tasks) - 0.5, color="#cccccc", linewidth=1)
    axes.set_xticks(range(len(groups)), [task.removesuffix("-v3") for task in groups])
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("success rate")
    figure.legend(loc="outside upper center", ncols=len(success), frameon=False, fontsize=8)
    return as_svg(figure)


def curve_panels(curves: dict[str, Curve], switch: int | None = None, columns: int = 3) -> str:
    """One panel per group of scalars (`a/x` and `a/y` are group `a`); a dashed line marks the stage switch."""
    groups: dict[str, dict[str, Curve]] = defaultdict(dict)
    for tag, curve in curves.items():
        group, _, name = tag.rpartition("/")
        groups[group or name][name] = curve
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (group, lines) in zip(panels, sorted(groups.items()), strict=False):
        for number, (name, curve) in enumerate(lines.items()):
            marker = "o" if len(curve.steps) < 8 else None
            color = COLORS[number % len(COLORS)]
            axes.plot(curve.steps, curve.values, color=color, label=name, linewidth=1.2, marker=marker, markersize=3)
        if switch is not None:
            axes.axvline(switch, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_title(f"{group}/{name}" if len(lines) == 1 and name != group else group, fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        if len(lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    return as_svg(figure)


def switch_step(curves: dict[str, Curve]) -> int | None:
    """The first step of the second stage, from the `stage` scalar that StageSwitch logs (0, then 1)."""
    stage = curves.get("stage")
    if stage is None:
        return None
    changes = zip(pairwise(stage.values), stage.steps[1:], strict=True)
    return next((step for (before, after), step in changes if before < after), None)


def as_svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()
