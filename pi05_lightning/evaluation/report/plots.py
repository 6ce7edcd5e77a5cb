"""Figures of the page, as SVG text."""

from __future__ import annotations

import io
import math
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pi05_lightning.evaluation.report.run import Curve, is_of_training
from pi05_lightning.evaluation.statistics import Success, rates

# Okabe and Ito's palette, told apart with any colour vision
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
HATCHES = ("", "///", "...", "xxx")  # of bars, each time that the colours begin again
MOST_BESIDE = 8  # groups of bars that stand side by side; their names would overlap, or be too small on the page
SMOOTHING = 0.8  # of curves: what the average keeps of itself at a step
ActingByMode = Mapping[str, Mapping[str, Any]]
"""How a rollout's policy acted, by mode."""
MODE_LABELS = {
    "policy": "policy, subtask first",
    "flat": "policy, task only",
    "fast": "policy, FAST tokens",
    "rtc": "policy, delay with RTC",
    "async": "policy, delay without RTC",
    "mean_replay": "mean trajectory",
    "random": "random actions",
    "expert": "scripted expert",
}


def mode_label(mode: str, acting: ActingByMode) -> str:
    """A mode of a rollout in words, with the kind of instruction that it was given: `flat, swapped`."""
    acted, comma, instruction = mode.partition(",")
    says_nothing = acted == "policy" and acting.get(acted, {}).get("hierarchical") is False
    return (acted if says_nothing else MODE_LABELS.get(acted, acted)) + comma + instruction


def success_bars(success: Success, acting: ActingByMode) -> str:
    """Success rate per task and mode with its 95 % Wilson interval, and over all tasks; many are one below another."""
    found = rates(success)
    groups = list(next(iter(found.values())))
    below = len(groups) > MOST_BESIDE
    size = (9.0, 1 + len(groups) * (0.1 + 0.12 * len(success))) if below else (max(7.0, 1.6 * len(groups)), 3.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw, along, across = (axes.barh, axes.xaxis, axes.yaxis) if below else (axes.bar, axes.yaxis, axes.xaxis)
    width = 0.8 / len(success)
    for number, (mode, by_task) in enumerate(found.items()):
        heights = np.array([by_task[group].value for group in groups])
        bounds = np.array([[by_task[group].low, by_task[group].high] for group in groups])
        error = np.abs(bounds.T - heights)
        place = np.arange(len(groups)) + (number - (len(success) - 1) / 2) * width
        cycle, color = divmod(number, len(COLORS))
        draw(
            place,
            heights,
            0.9 * width,
            **{"xerr" if below else "yerr": error},
            color=COLORS[color],
            hatch=HATCHES[cycle % len(HATCHES)],
            label=mode_label(mode, acting),
            ecolor="#444444",
        )
    (axes.axhline if below else axes.axvline)(len(groups) - 1.5, color="#cccccc", linewidth=1)
    across.set_ticks(range(len(groups)), [task.removesuffix("-v3") for task in groups])
    across.set_inverted(below)  # the first on top
    if below:
        axes.margins(y=0.005)
    along.set_view_interval(0, 1.05, ignore=True)
    along.set_label_text("success rate")
    figure.legend(loc="outside upper center", ncols=min(len(success), 4), frameon=False, fontsize=8)
    return as_svg(figure)


def jump_bars(jumps: Mapping[str, Mapping[str, Mapping[str, float]]], acting: ActingByMode) -> str:
    """Mean jump of the actions where chunks meet and inside them, per mode; a line up to the 95th percentile."""
    figure = Figure(figsize=(max(7.0, 1.4 * len(jumps)), 2.8), layout="constrained")
    axes = figure.subplots()
    for number, (part, label) in enumerate((("seams", "where chunks meet"), ("inside", "inside chunks"))):
        means = np.array([parts[part]["mean"] for parts in jumps.values()])
        above = np.array([parts[part]["p95"] for parts in jumps.values()]) - means
        error = np.stack([np.zeros_like(means), np.maximum(above, 0)])
        place = np.arange(len(jumps)) + (number - 0.5) * 0.4
        axes.bar(place, means, 0.36, yerr=error, color=COLORS[number], label=label, ecolor="#444444")
    axes.set_xticks(range(len(jumps)), [mode_label(mode, acting) for mode in jumps])
    axes.set_ylabel("share of the range")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return as_svg(figure)


_PARAMETERS = re.compile(r"(?P<no>no_)?decay(?P<factors>(?:_x[\d.e+-]+)*)")
NAMES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "mixture": "share of the samples",
    "data/padding": "share of padding",
    "data/bad_samples": "bad samples left out",
    "throughput/samples_per_second": "samples per second",
    "throughput/tokens_per_second": "tokens per second",
    "throughput/seconds_per_step": "seconds per step",
    "throughput/tflops_per_second": "TFLOP/s",
    "throughput/hardware_share": "share of the hardware's rate",
    "memory/process_peak_gb": "peak of the process, GB",
    "memory/gpu_peak_gb": "peak of the GPU, GB",
    "memory/gpu_reserved_gb": "reserved on the GPU, GB",
}
"""What scalars are called on the page whose tags say it badly."""
ERRORS = {"action_mae": "mean absolute error", "action_accuracy": "share of accurate actions"}
EXACT = ("lr", "memory")
"""What scalars begin with that do not scatter: nothing of them is smoothed."""
SMOOTHED_FROM = 60  # points; TensorBoard's habit: the values faint, their moving average over them
TOPICS: dict[str, str | tuple[str, ...]] = {
    "losses": "loss/",
    "validation": "val/",
    "closed loop": ("rollout/", "rollout_"),  # the second of those that have a name
    "learning rates": "lr",
    "gradient norms": "grad_norm/",
    "speed": "throughput/",
    "mixture drawn": "mixture/",
    "bad samples": "data/",
    "memory": "memory/",
}
"""Topic -> what its tags begin with, in the order of the page."""


def topic_panels(curves: Mapping[str, Curve], switches: Sequence[int]) -> dict[str, str]:
    """Topic -> figure of all its curves that have more than one point."""
    figures = {}
    for topic, start in TOPICS.items():
        found = {tag: curve for tag, curve in curves.items() if tag.startswith(start) and len(curve.steps) > 1}
        if found:
            figures[topic] = curve_panels(found, switches)
    return figures


def curve_panels(curves: Mapping[str, Curve], switches: Sequence[int]) -> str:
    """One panel per group of scalars (`a/x` and `a/y` are group `a`); dashed lines mark where a stage begins.

    Scalars that differ by more than a hundredfold have panels of their own.
    """
    panels_of = by_panel(curves)
    columns = min(3, len(panels_of))
    rows = -(-len(panels_of) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 6.0), 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, lines) in zip(panels, panels_of.items(), strict=False):
        for number, (name, curve) in enumerate(lines.items()):
            color = COLORS[number % len(COLORS)]
            is_smoothed = len(curve.steps) > SMOOTHED_FROM and not title.startswith(EXACT)
            for part, of_stage in enumerate(by_stage(title, curve, switches)):
                marker = "o" if len(of_stage.steps) < 8 else None
                values = of_stage.values
                if is_smoothed:
                    axes.plot(of_stage.steps, values, color=color, linewidth=0.8, alpha=0.3)
                    values = smoothed(values)
                label = None if part else readable(name)
                axes.plot(of_stage.steps, values, color=color, label=label, linewidth=1.2, marker=marker, markersize=3)
        for switch in switches:
            axes.axvline(switch, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_title(readable(title), fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        if len(lines) > 1:
            axes.legend(fontsize=7, frameon=False, loc="upper right")
    for axes in panels[len(panels_of) :]:
        axes.set_axis_off()
    return as_svg(figure)


def by_stage(tag: str, curve: Curve, switches: Sequence[int]) -> list[Curve]:
    """The parts of a curve between the steps at which stages begin: nothing is drawn or smoothed over these.

    What is measured at such a step is of the weights that the stage before it left.
    """
    cut = bisect_left if is_of_training(tag) else bisect_right
    edges = [0, *(cut(curve.steps, switch) for switch in switches), len(curve.steps)]
    parts = [Curve(curve.steps[begin:end], curve.values[begin:end]) for begin, end in pairwise(edges)]
    return [part for part in parts if part.steps]


def readable(tag: str) -> str:
    """What a scalar is, for a person: of `lr/decay_x1_x0.1` which parameters, and their factors in each stage."""
    group, slash, name = tag.rpartition("/")
    if found := _PARAMETERS.fullmatch(name):
        factors = [factor for factor in (found["factors"] or "").split("_x") if factor]
        name = f"{'without' if found['no'] else 'with'} weight decay"
        if any(float(factor) != 1 for factor in factors):
            name += f", × {', '.join(factors)} by stage"
    words = f"{group}{slash}{name}" if slash else name
    return NAMES.get(words, words.replace("_", " ").replace("/", " · "))


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average without bias at its start; gaps where values are no numbers."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = SMOOTHING * total + value, SMOOTHING * norm + 1
        out.append(total / norm if norm and math.isfinite(value) else math.nan)
    return out


def by_panel(curves: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Panel title -> label -> curve; `a/x` stands beside `a/x_of/y`, of which it is the whole."""
    found = {tag.rpartition("/")[0] for tag in curves}
    wholes = {group: whole for group in found if (whole := group.removesuffix("_of")) in curves}  # older runs: `a/x/y`
    groups: dict[str, dict[str, Curve]] = defaultdict(dict)
    for tag, curve in curves.items():
        group, _, name = tag.rpartition("/")
        groups[tag if tag in wholes.values() else wholes.get(group, group) or name][name] = curve
    panels: dict[str, dict[str, Curve]] = {}
    for group, lines in sorted(groups.items(), key=lambda item: (min(c.steps[0] for c in item[1].values()), item[0])):
        heights = [max(map(abs, curve.values)) for curve in lines.values()]
        alike = len(lines) <= len(COLORS) and max(heights) <= 100 * max(min(heights), 1e-12)
        for name, curve in lines.items():
            title = group if (alike and len(lines) > 1) or name == group.rpartition("/")[2] else f"{group}/{name}"
            panels.setdefault(title, {})[name] = curve
    return panels


def switch_steps(curves: Mapping[str, Curve]) -> list[int]:
    """The first step of each stage after the first, from the `stage` scalar that StageSwitch logs (0, 1, …)."""
    stage = curves.get("stage")
    if stage is None:
        return []
    changes = zip(pairwise(stage.values), stage.steps[1:], strict=True)
    return [step for (before, after), step in changes if before < after]


def as_svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def draw_horizon(values: Mapping[str, float | None]) -> Figure:
    """Mean absolute error and accuracy of an action over the steps of the horizon, and per dim, normalised."""
    figure = Figure(figsize=(9.6, 2.5), layout="constrained")
    kinds = (("action_mae", "step"), ("action_accuracy", "step"), ("action_mae", "dim"))
    for axes, (metric, kind), color in zip(figure.subplots(1, len(kinds)), kinds, COLORS, strict=False):
        points = {
            int(name.rpartition("_")[2]): np.nan if value is None else value
            for name, value in values.items()
            if name.startswith(f"{metric}/{kind}_")
        }
        if kind == "step":
            axes.plot(list(points), list(points.values()), color=color, marker="o", markersize=3, linewidth=1.2)
        else:
            axes.bar(list(points), list(points.values()), color=color)
        axes.set_title(ERRORS[metric], fontsize=9, loc="left")
        axes.set_xlabel("step of the horizon" if kind == "step" else "action dim", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.update_datalim([(0, 0)], updatex=False)
        axes.autoscale_view()  # with room above what is highest, counted from 0
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
    return figure
