"""What rollouts came to: success with its interval, failures by reason, time per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Column, Table

from pi05_lightning.acting import Acting
from pi05_lightning.evaluation.report.tables import shown_option, table_of
from pi05_lightning.evaluation.statistics import ALL, Success, rates
from pi05_lightning.sim.trials import Clock, Result


def summarise(results: Sequence[Result], clocks: Mapping[str, Clock]) -> dict[str, Any]:
    """Plain types for rollout.json.

    A mode with another instruction than the right one is `mode, instruction`.

    success       {mode: {task: [successes, trials]}}
    swapped       {mode: {task: {told: task, success: [successes, trials]}}} at the task whose instruction was given;
                  success is null where it is not judged in this scene
    chains        {mode: {task: {episodes, in_a_row: [of episodes with at least 1, 2, … done], mean}}} of instructions
                  that were done one after the other
    wilson_95     {mode: {task, and "all tasks": [low, high]}} of the success rate
    seconds       {mode: {task: {median, p95}}} of simulated time that successes took; nothing of tasks without any
    per_minute    {mode: successes per minute of simulated time, that of failures included, and all that a crash had}
    failures      {mode: {task: {reason: episodes}}}
    crashed       what each episode says that ended by a fault of the policy or the simulator
    jumps         {mode: {seams, inside: {mean, p95}, ratio: {mean, p95}}}: from an action to the next one, where chunks
                  meet and within them, as a share of the actions' range, see `motion.jumps`
    milliseconds  {mode: {decision: {median, p95, lanes}, step: {median, p95}}}: one call of the policy for `lanes`
                  episodes on average, and one action in the simulator
    """
    success: dict[str, dict[str, list[int]]] = {}
    failures: dict[str, dict[str, Counter[str]]] = {}
    columns: dict[str, list[Result]] = {}
    for result in results:
        column, task = result.trial.column, result.trial.task
        columns.setdefault(column, []).append(result)
        counts = success.setdefault(column, {}).setdefault(task, [0, 0])
        counts[0] += result.success
        counts[1] += 1
        reasons = failures.setdefault(column, {}).setdefault(task, Counter())
        if not result.success:
            reasons[result.reason] += 1
    return {
        "success": success,
        "wilson_95": {
            mode: {task: [round(rate.low, 4), round(rate.high, 4)] for task, rate in by_task.items()}
            for mode, by_task in rates(success).items()
        },
        "seconds": {mode: seconds(of_mode) for mode, of_mode in columns.items()},
        "per_minute": {mode: per_minute(of_mode) for mode, of_mode in columns.items()},
        "failures": {mode: {task: dict(r) for task, r in by_task.items() if r} for mode, by_task in failures.items()},
        "crashed": [f"{(t := r.trial).column} {t.task} seed {t.seed}: {r.reason}" for r in results if r.crashed],
        "jumps": {mode: found for mode, of_mode in columns.items() if (found := jumps(of_mode))},
        "swapped": swapped(results),
        "chains": chains(results),
        "milliseconds": {mode: milliseconds(clock) for mode, clock in clocks.items() if mode in success},
        "max_seconds": {result.trial.task: result.max_seconds for result in results if result.max_seconds},
    }


def seconds(results: Iterable[Result]) -> dict[str, dict[str, float]]:
    """Of each task, the simulated time that its successes took."""
    taken: dict[str, list[float]] = {}
    for result in results:
        if result.success and result.fps:
            taken.setdefault(result.trial.task, []).append(result.decisions / result.fps)
    return {task: _median_and_p95(np.array(of_task)) for task, of_task in taken.items()}


def per_minute(results: Sequence[Result]) -> float:
    """Successes per minute of simulated time: what a policy gets done, as it is faster or fails less.

    A crash counts with all the time that it had: else it would cost less than to run out of time.
    """
    total = sum(r.max_seconds if r.crashed else r.decisions / r.fps for r in results if r.fps)
    return round(60 * sum(result.success for result in results) / total, 2) if total else 0.0


def swapped(results: Iterable[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per mode and task: which task's instruction was given, and success at that one."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        if (trial := result.trial).other is not None:
            told = {"told": trial.other, "success": None}
            of_task = found.setdefault(trial.column, {}).setdefault(trial.task, told)
            if result.solved_other is not None:
                successes, count = of_task["success"] or (0, 0)
                of_task["success"] = [successes + result.solved_other, count + 1]
    return found


def chains(results: Iterable[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per mode and task with several instructions: how many were done in a row, as CALVIN counts them."""
    done: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.done is not None:
            done.setdefault((result.trial.column, result.trial.task), []).append(result)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (column, task), episodes in done.items():
        counts = [result.done or 0 for result in episodes]
        found.setdefault(column, {})[task] = {
            "episodes": len(counts),
            "in_a_row": [sum(count >= n for count in counts) for n in range(1, episodes[0].length + 1)],
            "mean": round(float(np.mean(counts)), 4),
        }
    return found


def jumps(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Mean and 95th percentile of the jumps at seams and inside chunks, and the former over the latter.

    Nothing where no chunk met another, and no ratio where actions are the same inside chunks.
    """
    parts = {"seams": [j for r in results for j in r.seams], "inside": [j for r in results for j in r.inside]}
    if not all(parts.values()):
        return {}
    measured = {name: {"mean": float(np.mean(j)), "p95": float(np.percentile(j, 95))} for name, j in parts.items()}
    inside = measured["inside"]
    ratio = {name: value / inside[name] for name, value in measured["seams"].items() if inside[name] > 0}
    return {
        name: {kind: round(value, 4) for kind, value in part.items()}
        for name, part in (measured | {"ratio": ratio}).items()
    }


def milliseconds(clock: Clock) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of what the clock measured; nothing for what did not happen."""
    times = {"decision": clock.decisions, "step": clock.steps}
    found = {name: _median_and_p95(1e3 * np.array(t)) for name, t in times.items() if t}
    if clock.lanes:
        found["decision"]["lanes"] = round(float(np.mean(clock.lanes)), 2)
    return found


def _median_and_p95(values: np.ndarray) -> dict[str, float]:
    return {"median": round(float(np.median(values)), 3), "p95": round(float(np.percentile(values, 95)), 3)}


def by_group(success: Success, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Success in groups of tasks, such as the difficulties of a benchmark; nothing where there are no groups.

    groups  {mode: {group: {success: [successes, trials], tasks: how many of its tasks were run}}}
    macro   {mode: mean of the groups' rates}; null where a group has no trial
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for mode, by_task in success.items():
        for group, tasks in groups.items():
            counts = [by_task[task] for task in tasks if task in by_task]
            summed = [sum(column) for column in zip([0, 0], *counts, strict=True)]
            found.setdefault(mode, {})[group] = {"success": summed, "tasks": len(counts)}
    means = {mode: _mean_rate(of_mode) for mode, of_mode in found.items()}
    return {"groups": found, "macro": means} if found else {}


def _mean_rate(groups: Mapping[str, Mapping[str, Any]]) -> float | None:
    counts = [group["success"] for group in groups.values()]
    return round(float(np.mean([k / n for k, n in counts])), 4) if all(n for _, n in counts) else None


def tables(result: Mapping[str, Any]) -> Iterable[Table]:
    """Success, failures and times, each as wide as a terminal of 80 columns for five modes."""
    yield success_table(result["success"], result["per_minute"], result.get("held_out", False))
    if result.get("groups"):
        yield groups_table(result["groups"], result["macro"], result["success"])
    if result.get("acting"):
        yield acting_table(result["acting"])
    if result.get("swapped"):
        yield swapped_table(result["swapped"], result["success"])
    if result.get("chains"):
        yield chains_table(result["chains"])
    if any(by_task for by_task in result["failures"].values()):
        yield _failures(result["failures"])
    if result.get("jumps"):
        yield _jumps(result["jumps"])
    yield _times(result["milliseconds"])


def success_table(success: Success, per_minute: Mapping[str, float], held_out: bool) -> Table:
    """Successes of trials, with the interval, per task and of all tasks; how many in a minute, where that is known.

    held_out: whether it is known that no training episode began in these initial states.
    """
    found = rates(success)
    states = "on held-out initial states, " if held_out else "and its "
    table = _table(f"success {states}95 % Wilson interval", ["task"], found)
    for task in next(iter(found.values())):
        if task == ALL:
            table.add_section()
        of_modes = [by_task[task] for by_task in found.values()]
        table.add_row(escape(task), *(f"{r.successes}/{r.trials}\n[dim]{r.low:.2f}–{r.high:.2f}[/]" for r in of_modes))
    if per_minute:
        table.add_row("successes per simulated minute", *(f"{per_minute[mode]:.1f}" for mode in found))
    return table


def groups_table(
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]], macro: Mapping[str, float | None], success: Success
) -> Table:
    """Success rates per group of tasks, their mean, and the mean over episodes."""
    table = _table("success by group, and the mean of the groups", ["group", "tasks"], groups)
    for group, of_first in next(iter(groups.values())).items():
        counts = [of_mode[group]["success"] for of_mode in groups.values()]
        table.add_row(
            group.replace("_", " "), str(of_first["tasks"]), *(f"{k / n:.2f}" if n else "–" for k, n in counts)
        )
    table.add_section()
    table.add_row("mean of the groups", "", *("–" if mean is None else f"{mean:.2f}" for mean in macro.values()))
    table.add_row("mean over episodes", "", *(f"{of_mode[ALL].value:.2f}" for of_mode in rates(success).values()))
    return table


def swapped_table(swapped: Mapping[str, Mapping[str, Mapping[str, Any]]], success: Success) -> Table:
    """Success at the scene's own task, and at the one whose instruction was given."""
    headings = ("at its own task", "at the task told")
    table = table_of("told another task's instruction", ["mode", "task", "told"], headings)
    for mode, by_task in swapped.items():
        for task, result in by_task.items():
            own, other = success[mode][task], result["success"]
            counts = (f"{own[0]}/{own[1]}", f"{other[0]}/{other[1]}" if other else "not judged in this scene")
            table.add_row(mode.partition(",")[0], escape(task), escape(result["told"]), *counts)
    return table


def chains_table(chains: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Episodes with at least one, two, … instructions done in a row, and how many on average."""
    length = max(len(result["in_a_row"]) for by_task in chains.values() for result in by_task.values())
    headings = (*map(str, range(1, length + 1)), "mean")
    table = table_of("episodes with so many instructions done in a row", ["mode", "task", "episodes"], headings)
    for mode, by_task in chains.items():
        for task, result in by_task.items():
            table.add_row(
                mode, escape(task), *map(str, (result["episodes"], *result["in_a_row"])), f"{result['mean']:.2f}"
            )
    return table


def acting_table(acting: Mapping[str, Mapping[str, Any]]) -> Table:
    """Options of the policy in every mode, without those that are as by default in all of them."""
    default = asdict(Acting())
    table = _table("how the policy acted", ["option"], acting)
    for name in default:
        values = [options[name] for options in acting.values()]
        if any(value != default[name] for value in values):
            table.add_row(name, *(escape(shown_option(value)) for value in values))
    table.caption, table.caption_justify = "all other options are the defaults", "left"
    return table


def _failures(failures: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Table:
    table = _table("failures by reason", ["task", "reason"], failures)
    rows = {(task, reason) for by_task in failures.values() for task, r in by_task.items() for reason in r}
    for task, reason in sorted(rows):
        counts = [by_task.get(task, {}).get(reason, 0) for by_task in failures.values()]
        table.add_row(escape(task), escape(reason), *(str(count or "·") for count in counts))
    return table


def _jumps(jumps: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    headings = ("seams, mean", "p95", "inside, mean", "p95", "ratio, mean", "p95")
    table = table_of("|a(t+1) - a(t)| where chunks meet and inside them, share of the range", ["mode"], headings)
    for mode, parts in jumps.items():
        values = [parts[name].get(kind) for name in ("seams", "inside", "ratio") for kind in ("mean", "p95")]
        table.add_row(mode, *("–" if value is None else f"{value:.3g}" for value in values))
    return table


def _times(milliseconds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    headings = ("", "median", "95th percentile", "episodes at once")
    table = table_of("milliseconds per step", headings, padding=(0, 1), pad_edge=False)
    for mode, measured in milliseconds.items():
        for name, label in (("decision", "policy"), ("step", "simulator")):
            if name in measured:
                time = measured[name]
                table.add_row(
                    f"{mode}: {label}", f"{time['median']:.1f}", f"{time['p95']:.1f}", str(time.get("lanes", ""))
                )
    return table


def _table(title: str, labels: Sequence[str], modes: Iterable[str]) -> Table:
    columns = [Column(name, no_wrap=name == "task") for name in labels]
    return table_of(title, columns, [mode.replace("_", "\n").replace(", ", "\n") for mode in modes], pad_edge=False)
