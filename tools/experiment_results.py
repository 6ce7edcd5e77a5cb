"""What the runs of an experiment came to: results.json, the plot, and the tables in its README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pi05_lightning.evaluation.report.plots import COLORS
from pi05_lightning.evaluation.report.tables import markdown_table
from pi05_lightning.files.local import read_json, write_json, write_text
from tools import experiment_recipes
from tools.experiment_recipes import Measure, Recipe, Result, recipe_of

METRICS = ("flow_loss", "action_mae")  # that validation has of robot/continuous_robot_actions
MEASURED = ("success", "per_minute", "swapped", "chains")  # of a rollout
PANELS = 4  # in a row of a plot
MARKS = ("<!-- TABLES -->", "<!-- /TABLES -->")  # in a README: what is between them is written here

Arms = Mapping[str, Mapping[str, Result]]
"""{experiment: {training seed: result}}"""


def gather(name: str, out: Path) -> None:
    """Write results.json and plot.png of an experiment from its runs, and the tables into its README."""
    recipe, folder = recipe_of(name), experiment_recipes.EXPERIMENTS
    results = {str(seed): read_result(run, recipe) for seed, run in seeds_in(out / name).items()}
    write_json(folder / name / "results.json", {seed: result for seed, result in results.items() if result})
    variants = sorted(path.name for path in folder.glob(f"{recipe.name[:3]}[a-z]_*")) if name == recipe.name else []
    names = dict.fromkeys((recipe.name, name, *variants))
    arms = {arm: found for arm in names if (found := read_json(folder / arm / "results.json", default={}))}
    plot(arms, recipe).savefig(folder / name / "plot.png", dpi=120)
    tables = mean_table(arms, recipe) if variants else f"{seed_table(arms, recipe)}\n\n{task_table(arms, recipe)}"
    print(tables)
    fill(folder / name / "README.md", f"{tables}\n\n![What was measured, per seed](plot.png)")


def seeds_in(folder: Path) -> dict[int, Path]:
    """The runs of an experiment by their seeds; a folder that was renamed, such as seed0_old, is none."""
    there = {run.name.removeprefix("seed"): run for run in folder.glob("seed*") if run.is_dir()}
    return dict(sorted((int(seed), run) for seed, run in there.items() if seed.isdigit()))


def fill(readme: Path, content: str) -> None:
    """Put the content between the README's marks for it; one without marks is left as it is."""
    text = readme.read_text(encoding="utf-8")
    first, mark, rest = text.partition(MARKS[0])
    if mark:
        write_text(readme, f"{first}{mark}\n\n{content}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def read_result(run: Path, recipe: Recipe) -> Result:
    """What a seed's rollouts and validation measured so far; nothing before it was rolled out."""
    rollouts = {name: found for name, file in recipe.rollouts.items() if (found := read_json(run / file, default={}))}
    if not rollouts:
        return {}
    measured = read_json(run / "metrics.json", default={}).get("robot/continuous_robot_actions", {})
    return {
        **{name: {key: found[key] for key in MEASURED if found.get(key)} for name, found in rollouts.items()},
        "validation": {metric: measured[metric] for metric in METRICS if metric in measured},
        "cpu_seconds": read_json(run / "parts" / "fit.json", default={}).get("cpu_seconds"),
    }


def columns_of(recipe: Recipe) -> dict[str, tuple[Measure, int]]:
    """What a recipe is judged by, and how many digits of it are shown."""
    return {**{heading: (measure, 3) for heading, measure in recipe.shares.items()}, **recipe.numbers}


def mean_table(arms: Arms, recipe: Recipe) -> str:
    """A row per experiment: means ± standard deviations of its seeds; of how many, where some were not measured."""
    columns, rows = columns_of(recipe), list[tuple[object, ...]]()
    for arm, results in arms.items():
        measured = (([value(r) for r in results.values()], digits) for value, digits in columns.values())
        cells = (f"{shown(values, digits)}{_fewer(values)}" for values, digits in measured)
        rows.append((arm.replace("_", " "), len(results), *cells))
    return markdown_table(("experiment", "training seeds", *columns), rows)


def seed_table(arms: Arms, recipe: Recipe) -> str:
    """A row per experiment and seed, and one of each experiment's means ± standard deviations."""
    columns, rows = columns_of(recipe), list[tuple[object, ...]]()
    for arm, results in arms.items():
        values = {heading: [value(result) for result in results.values()] for heading, (value, _) in columns.items()}
        for place, seed in enumerate(results):
            cells = (shown(values[heading][place : place + 1], digits) for heading, (_, digits) in columns.items())
            rows.append((number(arm), seed, *cells))
        cells = (f"**{shown(values[heading], digits)}**" for heading, (_, digits) in columns.items())
        rows.append((f"**{number(arm)}**", "**mean**", *cells))
    return markdown_table(("experiment", "training seed", *columns), rows)


def task_table(arms: Arms, recipe: Recipe) -> str:
    """Successes of all seeds together, per task, experiment and mode; of those that have it."""
    columns = {
        f"{number(arm)}, {heading}": found
        for arm, results in arms.items()
        for (rollout, mode), heading in recipe.modes.items()
        if (
            found := [
                s[mode] for result in results.values() if mode in (s := result.get(rollout, {}).get("success", {}))
            ]
        )
    }
    rows = list[tuple[object, ...]]()
    for task in dict.fromkeys(task for seeds in columns.values() for by_task in seeds for task in by_task):
        counts = [[by_task[task] for by_task in seeds if task in by_task] for seeds in columns.values()]
        cells = (f"{sum(s for s, _ in column)}/{sum(n for _, n in column)}" if column else "–" for column in counts)
        rows.append((task, *cells))
    return markdown_table(("task", *columns), rows)


def number(arm: str) -> str:
    """Of an experiment, by its folder's name."""
    return arm.partition("_")[0]


def shown(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation of what was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{fmean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 else "")


def _fewer(values: Sequence[float | None]) -> str:
    known = len(values) - values.count(None)
    return f" (n = {known})" if 0 < known < len(values) else ""


def plot(arms: Arms, recipe: Recipe) -> Figure:
    """Shares and the first number: a dot per seed and a line at their mean; dashed: what is the same for all.

    Several experiments have a panel for each of these; of one alone, all shares are in one.
    """

    def values(arm: str, measure: Measure) -> list[float]:
        return [value for result in arms[arm].values() if (value := measure(result)) is not None]

    heading, (measured, _) = next(iter(recipe.numbers.items()))
    by_arm = {
        title: {arm.replace("_", " "): values(arm, measure) for arm in arms}
        for title, measure in {**recipe.shares, heading: measured}.items()
    }
    alone = {"success": {title: values(next(iter(arms)), measure) for title, measure in recipe.shares.items()}}
    panels = by_arm if len(arms) > 1 else {**alone, heading: by_arm[heading]}
    columns = min(len(panels), PANELS)
    rows = -(-len(panels) // columns)
    height = 1 + 0.25 * max(map(len, panels.values()))
    figure = Figure(figsize=(2 + 2.25 * PANELS, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=len(arms) > 1, squeeze=False).flat
    dashed = {recipe.dashed(result) for found in arms.values() for result in found.values()} - {None}
    if dashed:
        figure.supxlabel("dashed: mean trajectory", fontsize="medium")
    for (title, places), axis in zip(panels.items(), axes, strict=False):
        for place, found in enumerate(places.values()):
            dots(axis, found, place)
        axis.set_title(title, fontsize="medium")
        axis.set_xlim(0, 1.1 * axis.get_xlim()[1] if title == heading else 1.02)
        for same in dashed if title != heading else ():
            axis.axvline(same, color="#444444", linestyle="--", linewidth=1)
        axis.set_ylim(len(places) - 0.5, -0.5)
        axis.set_yticks(range(len(places)), [*places])
    for axis in axes:
        axis.set_axis_off()
    return figure


def dots(axes: Axes, values: Sequence[float], place: int) -> None:
    if values:
        axes.plot(values, [place] * len(values), "o", color=COLORS[0], alpha=0.7)
        axes.vlines(fmean(values), place - 0.3, place + 0.3, color=COLORS[0], linewidth=2)
