"""What rollouts came to: success with its interval, failures by reason, time per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from pi05_lightning.evaluation.statistics import wilson_interval
from pi05_lightning.sim.trials import ENDED, OUT_OF_TIME, Clock, Mode, Trial

ALL = "all tasks"
Counts = dict[str, dict[str, list[int]]]
"""mode -> task -> successes, trials"""


def summarise(trials: Sequence[Trial], clocks: Mapping[Mode, Clock]) -> dict[str, Any]:
    """Plain types for rollout.json.

    success       {mode: {task: [successes, trials]}}
    wilson_95     {mode: {task, and "all tasks": [low, high]}} of the success rate
    failures      {mode: {task: {reason: episodes}}}
    crashed       what each episode that ended by the policy's fault says
    milliseconds  {mode: {decision: {median, p95, lanes}, step: {median, p95}}}: one call of the policy for `lanes`
                  episodes on average, and one action in the simulator
    """
    success: Counts = {}
    failures: dict[str, dict[str, Counter[str]]] = {}
    for trial in trials:
        counts = success.setdefault(trial.mode, {}).setdefault(trial.task, [0, 0])
        counts[0] += trial.success
        counts[1] += 1
        reasons = failures.setdefault(trial.mode, {}).setdefault(trial.task, Counter())
        if not trial.success:
            reasons[trial.reason] += 1
    return {
        "success": success,
        "wilson_95": {mode: intervals(by_task) for mode, by_task in success.items()},
        "failures": {mode: {task: dict(r) for task, r in by_task.items() if r} for mode, by_task in failures.items()},
        "crashed": [
            f"{t.mode} {t.task} seed {t.seed}: {t.reason}" for t in trials if t.reason not in ("", OUT_OF_TIME, ENDED)
        ],
        "milliseconds": {mode: milliseconds(clock) for mode, clock in clocks.items() if mode in success},
        "max_seconds": {trial.task: trial.max_seconds for trial in trials},
    }


def intervals(by_task: Mapping[str, Sequence[int]]) -> dict[str, list[float]]:
    """The 95 % Wilson interval of every task and of all together."""
    total = [sum(column) for column in zip(*by_task.values(), strict=True)]
    return {
        task: [round(bound, 4) for bound in wilson_interval(*counts)]
        for task, counts in {**by_task, ALL: total}.items()
    }


def milliseconds(clock: Clock) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of what the clock measured; nothing for what did not happen."""
    times = {"decision": clock.decisions, "step": clock.steps}
    found = {
        name: {"median": round(1e3 * float(np.median(t)), 3), "p95": round(1e3 * float(np.percentile(t, 95)), 3)}
        for name, t in times.items()
        if t
    }
    if clock.lanes:
        found["decision"]["lanes"] = round(float(np.mean(clock.lanes)), 2)
    return found


def tables(result: Mapping[str, Any]) -> Iterable[Table]:
    """Success, failures and times, each as wide as a terminal of 80 columns for five modes."""
    yield _success(result)
    if any(by_task for by_task in result["failures"].values()):
        yield _failures(result)
    yield _times(result)


def _success(result: Mapping[str, Any]) -> Table:
    success, bounds = result["success"], result["wilson_95"]
    totals = {m: [sum(column) for column in zip(*tasks.values(), strict=True)] for m, tasks in success.items()}
    table = _table("success on held-out initial states, 95 % Wilson interval", ["task"], success)
    for task in [*next(iter(success.values())), ALL]:
        if task == ALL:
            table.add_section()
        cells = []
        for mode, by_task in success.items():
            (count, trials), (low, high) = by_task.get(task, totals[mode]), bounds[mode][task]
            cells.append(f"{count}/{trials}\n[dim]{low:.2f}–{high:.2f}[/]")
        table.add_row(task, *cells)
    return table


def _failures(result: Mapping[str, Any]) -> Table:
    failures = result["failures"]
    table = _table("failures by reason", ["task", "reason"], failures)
    rows = {(task, reason): None for by_task in failures.values() for task, r in by_task.items() for reason in r}
    for task, reason in sorted(rows):
        counts = [by_task.get(task, {}).get(reason, 0) for by_task in failures.values()]
        table.add_row(task, reason, *(str(count or "·") for count in counts))
    return table


def _times(result: Mapping[str, Any]) -> Table:
    table = Table(
        "", "median", "95th percentile", "episodes at once", title="milliseconds per step", title_justify="left",
        box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for mode, measured in result["milliseconds"].items():
        for name, label in (("decision", "policy"), ("step", "simulator")):
            if name in measured:
                time = measured[name]
                lanes = str(time["lanes"]) if "lanes" in time else ""
                table.add_row(f"{mode}: {label}", f"{time['median']:.1f}", f"{time['p95']:.1f}", lanes)
    return table


def _table(title: str, first: Sequence[str], modes: Iterable[str]) -> Table:
    table = Table(
        *(Column(name, no_wrap=name == "task") for name in first),
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for mode in modes:
        table.add_column(mode.replace("_", "\n"), justify="right", no_wrap=True)
    return table
