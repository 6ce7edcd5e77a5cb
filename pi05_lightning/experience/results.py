"""What rounds of experience came to: success over the rounds of every method, as numbers and as a page."""

from __future__ import annotations

import logging
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pi05_lightning.evaluation.report.plots import COLORS, as_svg
from pi05_lightning.evaluation.report.tables import shown_option
from pi05_lightning.evaluation.statistics import ALL, Rate, rates
from pi05_lightning.experience.page import PageSection, write_page
from pi05_lightning.experience.rounds import METHODS
from pi05_lightning.files.local import read_json, write_json

log = logging.getLogger(__name__)


def write_results(out: Path) -> None:
    """results.json and index.html: what there is so far, of all methods that were ever asked for."""
    base = read_json(out / "base" / "rollout.json", default={})
    if not base:
        return
    found: dict[str, list[Rate]] = {}
    numbers: dict[str, list[dict[str, float | None]]] = {}
    held_out = base.get("held_out", False)
    for method in METHODS:
        rounds = sorted((out / method).glob("round_*"), key=lambda folder: int(folder.name.removeprefix("round_")))
        files = [folder / "rollout" / "rollout.json" for folder in rounds]
        tests = {file: rollout for file in files if (rollout := read_json(file, default={}))}
        for file, tested in tests.items():
            held_out &= tested.get("held_out", False)
            if crashed := tested.get("crashed"):
                log.warning("%s: %d episodes were ended by the policy's fault: %s", file, len(crashed), crashed[0])
        rollouts = [base, *tests.values()]
        if rounds:
            found[method] = [rates(rollout["success"])["policy"][ALL] for rollout in rollouts]
            speeds = [rollout.get("per_minute", {}).get("policy") for rollout in rollouts]  # since 0.2.0
            numbers[method] = [r._asdict() | {"per_minute": s} for r, s in zip(found[method], speeds, strict=True)]
    write_json(out / "results.json", numbers)
    rows = [["method", "round", "success", "95 % interval", "successes a minute"]]
    for name, of_rounds in found.items():
        for number, rate in enumerate(of_rounds):
            speed = numbers[name][number]["per_minute"]
            shown = [f"{rate.successes}/{rate.trials}", f"{rate.low:.2f} to {rate.high:.2f}", shown_option(speed)]
            rows.append([name, str(number), *shown])
    states = ", in initial states that nobody was trained on" if held_out else ""
    text = (
        f"Success at all tasks{states}; every round begins with the weights of 0."
        " A minute is one of simulated time, in which failures count too."
    )
    write_page(
        out / "index.html", f"Experience {out}", [PageSection("Success over rounds", [text], rows, [plot(found)])]
    )


def plot(found: dict[str, list[Rate]]) -> str:
    """Success over rounds with 95 % Wilson intervals, a line per method. SVG."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (method, of_rounds) in enumerate(found.items()):
        heights = [rate.value for rate in of_rounds]
        below = [rate.value - rate.low for rate in of_rounds]
        above = [rate.high - rate.value for rate in of_rounds]
        color = COLORS[place]
        shifted = [number + 0.03 * place for number in range(len(of_rounds))]
        axes.errorbar(shifted, heights, [below, above], marker="o", capsize=3, color=color, label=method)
    axes.set(xlabel="round", ylabel="success rate", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    return as_svg(figure)
