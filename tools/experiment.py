"""Runs an experiment with several training seeds, and gathers what they came to beside experiment 001.

An experiment is a folder under experiments/: a config.yaml, which says how it differs from 001, or a run.py with the
commands data, train and rollout. Data and FAST tokenizer are the demo's. What is done is not done again: an interrupted
experiment goes on where it was, and one that is done is only gathered anew.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jsonargparse import auto_cli
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pi05_lightning.cli.parts import run_command
from pi05_lightning.evaluation.report.plots import COLORS
from pi05_lightning.files.local import read_json, write_json, write_text

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
BASE, RECIPE = "configs/tiny.yaml", "001_metaworld"
# as the demo's, without the baselines that are the same for every training
ROLLOUT = ("--modes", "[policy,flat,mean_replay]", "--videos", "0")
METRICS = ("flow_loss", "action_mae")  # that validation has of robot/continuous_robot_actions
MODES = {"policy": "subtask first", "flat": "without subtask", "mean_replay": "mean trajectory"}
POLICY_MODES = ("policy", "flat")
MARKS = ("<!-- TABLES -->", "<!-- /TABLES -->")  # in a README: what is between them is written here

Result = dict[str, Any]
"""success: {mode: {task: [successes, trials]}},  validation: {metric: value},  cpu_seconds: of the training"""


def experiment(
    name: str, seeds: tuple[int, ...] = (0, 1, 2), demo: Path = Path("runs/demo"), out: Path = Path("runs/experiments")
) -> None:
    """Train, validate and roll out with every seed; write results.json, plot.png and the README's tables.

    Args:
        name: of the folder under experiments/.
        seeds: of the training; the data and the initial states of the rollouts are the same for every seed.
        demo: directory of a demo, for its data and its tokenizer.
        out: where the runs go, as NAME/seedN.

    Raises SystemExit for an unknown name, where there is no demo, and when a part fails.
    """
    names = sorted(folder.name for folder in EXPERIMENTS.iterdir() if folder.is_dir())
    if name not in names:
        raise SystemExit(f"there is no experiment {name!r}: it is one of {', '.join(names)}")
    for seed in seeds:
        for part, command in commands(name, seed, demo, out / name / f"seed{seed}").items():
            run_part(out / name / f"seed{seed}" / "parts" / f"{part}.json", command)
    gather(name, out)


def configs(name: str) -> list[str]:
    """The configurations of an experiment, in order: what it differs from comes first."""
    return [BASE, *(f"experiments/{layer}/config.yaml" for layer in dict.fromkeys((RECIPE, name)))]


def commands(name: str, seed: int, demo: Path, run: Path) -> dict[str, tuple[str, ...]]:
    """What a seed takes, part by part: arguments of `pi05`, or a script and its own."""
    data = demo / "data"
    if not (data / "robot").is_dir():
        raise SystemExit(f"{data} has no data: run `make demo` first, or give the directory of a demo with --demo")
    script = EXPERIMENTS / name / "run.py"
    if script.is_file():
        words = (str(data / "robot"), str(run))
        return {
            "data": (str(script), "data", words[0]),
            "fit": (str(script), "train", *words, "--seed", str(seed)),
            "rollout": (str(script), "rollout", *words),
        }
    layers = [word for config in configs(name) for word in ("-c", config)]
    paths = ("--data.sources.robot.path", f"{data}/robot", "--data.sources.web.path", f"{data}/web")
    fit = ("fit", *layers, "--run", str(run), "--seed_everything", str(seed), *paths, "--data.fast", f"{demo}/fast")
    if (run / "checkpoints" / "last.ckpt").exists():
        fit = ("fit", "--ckpt_path", str(run))
    return {"fit": fit, "validate": ("validate", str(run)), "rollout": ("rollout", str(run), *ROLLOUT)}


def run_part(marker: Path, command: tuple[str, ...]) -> None:
    """Run a command with one thread unless its marker says that it is done; the marker holds its CPU seconds."""
    before = read_json(marker, default={})
    if before.get("done"):
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other would count as work
    print("$", *command, flush=True)
    start, done = cpu_seconds(), False
    try:
        if command[0].endswith(".py"):
            status = subprocess.run([sys.executable, *command]).returncode
            if status:
                raise SystemExit(status)
        else:
            run_command(command)
        done = True
    finally:
        seconds = before.get("cpu_seconds", 0.0) + cpu_seconds() - start
        write_json(marker, {"cpu_seconds": round(seconds, 1), "done": done})


def cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# --- what the runs came to


def gather(name: str, out: Path) -> None:
    """Write results.json and plot.png of an experiment from its runs, and the tables into its README."""
    results = {run.name.removeprefix("seed"): read_result(run) for run in sorted((out / name).glob("seed*"))}
    write_json(EXPERIMENTS / name / "results.json", {seed: result for seed, result in results.items() if result})
    arms = {arm: read_json(EXPERIMENTS / arm / "results.json", default={}) for arm in dict.fromkeys((RECIPE, name))}
    arms = {arm: found for arm, found in arms.items() if found}
    plot(arms).savefig(EXPERIMENTS / name / "plot.png", dpi=120)
    tables = "\n".join([*seed_table(arms), "", *task_table(arms)])
    print(tables)
    fill(EXPERIMENTS / name / "README.md", f"{tables}\n\n![Success and action error per seed](plot.png)")


def fill(readme: Path, content: str) -> None:
    """Put the content between the README's marks for it; one without marks is left as it is."""
    text = readme.read_text(encoding="utf-8")
    first, mark, rest = text.partition(MARKS[0])
    if mark:
        write_text(readme, f"{first}{mark}\n\n{content}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def read_result(run: Path) -> Result:
    """What a seed's rollout and validation measured; nothing before it was rolled out."""
    success = read_json(run / "rollout" / "rollout.json", default={}).get("success")
    if not success:
        return {}
    measured = read_json(run / "metrics.json", default={}).get("robot/continuous_robot_actions", {})
    return {
        "success": success,
        "validation": {metric: measured[metric] for metric in METRICS if metric in measured},
        "cpu_seconds": read_json(run / "parts" / "fit.json", default={}).get("cpu_seconds"),
    }


def rate(result: Result, mode: str) -> float | None:
    """Success of a mode, mean over the tasks; None where it was not run."""
    counts = result["success"].get(mode, {}).values()
    return fmean(successes / trials for successes, trials in counts) if counts else None


COLUMNS: dict[str, tuple[Callable[[Result], float | None], int]] = {
    MODES["policy"]: (lambda result: rate(result, "policy"), 3),
    MODES["flat"]: (lambda result: rate(result, "flat"), 3),
    "flow loss": (lambda result: result["validation"].get("flow_loss"), 3),
    "action MAE": (lambda result: result["validation"].get("action_mae"), 3),
    "CPU seconds": (lambda result: result["cpu_seconds"], 0),
}
"""Of the table of seeds: heading -> value, digits."""


def seed_table(arms: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    """A row per experiment and seed, and one of each experiment's means ± standard deviations."""
    yield f"| experiment | training seed | {' | '.join(COLUMNS)} |"
    yield f"|---|---|{'---|' * len(COLUMNS)}"
    for arm, results in arms.items():
        values = {head: [value(result) for result in results.values()] for head, (value, _) in COLUMNS.items()}
        for place, seed in enumerate(results):
            cells = (shown(values[head][place : place + 1], digits) for head, (_, digits) in COLUMNS.items())
            yield f"| {arm[:3]} | {seed} | {' | '.join(cells)} |"
        cells = (f"**{shown(values[head], digits)}**" for head, (_, digits) in COLUMNS.items())
        yield f"| **{arm[:3]}** | **mean** | {' | '.join(cells)} |"


def task_table(arms: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    """Successes of all seeds together, per task, experiment and mode."""
    columns = [(arm, mode) for arm, results in arms.items() for mode in MODES if mode in modes_of(results)]
    tasks = dict.fromkeys(
        task for arm, mode in columns for result in arms[arm].values() for task in result["success"][mode]
    )
    yield f"| task | {' | '.join(f'{arm[:3]}, {MODES[mode]}' for arm, mode in columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for task in tasks:
        counts = [[result["success"][mode][task] for result in arms[arm].values()] for arm, mode in columns]
        cells = (f"{sum(s for s, _ in column)}/{sum(n for _, n in column)}" for column in counts)
        yield f"| {task} | {' | '.join(cells)} |"


def modes_of(results: Mapping[str, Result]) -> set[str]:
    """Those that every seed ran."""
    return set.intersection(*(set(result["success"]) for result in results.values()))


def shown(values: Sequence[float | None], digits: int) -> str:
    """Mean ± standard deviation of what was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{fmean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 else "")


def plot(arms: Mapping[str, Mapping[str, Result]]) -> Figure:
    """Success and action error: a dot per seed and a line at their mean; dashed: the mean trajectory's success."""
    results = [result for by_seed in arms.values() for result in by_seed.values()]
    rows = [(arm, mode) for arm, by_seed in arms.items() for mode in POLICY_MODES if mode in modes_of(by_seed)]
    names = list(arms)
    figure = Figure(figsize=(9, 1.1 + 0.4 * len(rows)), layout="constrained")
    success, error = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (arm, mode) in enumerate(rows):
        dots(success, [rate(result, mode) for result in arms[arm].values()], place, names.index(arm))
    for replay in {rate(result, "mean_replay") for result in results} - {None}:
        success.axvline(replay, color="#444444", linestyle="--", linewidth=1)
    success.set(xlim=(0, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="success (dashed: mean trajectory)")
    success.set_yticks(range(len(rows)), [f"{arm[:3]}, {MODES[mode]}" for arm, mode in rows])
    for place, arm in enumerate(names):
        dots(error, [result["validation"].get("action_mae") for result in arms[arm].values()], place, place)
    error.set(ylim=(len(names) - 0.5, -0.5), xlabel="action MAE on validation data")
    error.set_yticks(range(len(names)), [arm[:3] for arm in names])
    error.set_xlim(0, 1.1 * max((result["validation"].get("action_mae", 0.0) for result in results), default=0) or 1)
    return figure


def dots(axes: Axes, values: Sequence[float | None], place: int, color: int) -> None:
    known = [value for value in values if value is not None]
    if known:
        axes.plot(known, [place] * len(known), "o", color=COLORS[color], alpha=0.7)
        axes.vlines(fmean(known), place - 0.3, place + 0.3, color=COLORS[color], linewidth=2)


if __name__ == "__main__":
    auto_cli(experiment)
