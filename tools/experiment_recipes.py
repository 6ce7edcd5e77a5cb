"""What experiments begin with: a recipe on a scene, the rollouts of its policies, and what they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pi05_lightning.sim.desk.tasks import INSTRUCTIONS, SEVERAL_STEPS

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

Result = dict[str, Any]
"""{rollout: {success: {mode: {task: [successes, trials]}}, swapped, chains}},  validation: {metric: value},
cpu_seconds: of the training"""
Measure = Callable[[Result], float | None]


@dataclass(frozen=True)
class Recipe:
    """An experiment that others differ from.

    name      of its folder, whose number those begin with that differ from it: 009a_… from 009_…
    base      the configuration that it goes on from
    demo      where a demo of its scene has its data and its tokenizer, and the command that makes it
    rollouts  {name: options of `pi05 rollout`}
    shares    {heading: share in [0, 1]}
    numbers   {heading: (measure, digits)}; the first is drawn beside the shares
    modes     {(rollout, mode): heading} of the table of tasks
    dashed    the share that is the same for every training
    """

    name: str
    base: str
    demo: Path
    command: str
    rollouts: Mapping[str, tuple[str, ...]]
    shares: Mapping[str, Measure]
    numbers: Mapping[str, tuple[Measure, int]]
    modes: Mapping[tuple[str, str], str]
    dashed: Measure = field(default=lambda result: None)


def success(mode: str, rollout: str = "rollout") -> Measure:
    """Mean over the tasks; None where the mode was not run."""
    return lambda result: _rate(result.get(rollout, {}).get("success", {}).get(mode, {}).values())


def named(mode: str) -> Measure:
    """Success at the task whose instruction was given instead of the original one's."""
    return lambda result: _rate(
        by_task["success"] for by_task in result.get("rollout", {}).get("swapped", {}).get(mode, {}).values()
    )


def in_a_row(mode: str) -> Measure:
    """Instructions of a chain that were done in a row."""
    return lambda result: result.get("chains", {}).get("chains", {}).get(mode, {}).get("chain", {}).get("mean")


def validation(metric: str) -> Measure:
    """Of robot/continuous_robot_actions."""
    return lambda result: result["validation"].get(metric)


def _rate(counts: Iterable[tuple[int, int]]) -> float | None:
    rates = [successes / trials for successes, trials in counts]
    return fmean(rates) if rates else None


_SECONDS: Mapping[str, tuple[Measure, int]] = {"CPU seconds": (lambda result: result["cpu_seconds"], 0)}

METAWORLD = Recipe(
    "001_metaworld",
    base="configs/tiny.yaml",
    demo=Path("runs/demo"),
    command="make demo",
    # as the demo's, without the baselines that are the same for every training
    rollouts={"rollout": ("--modes", "[policy,flat,mean_replay]", "--videos", "0")},
    shares={"subtask first": success("policy"), "without subtask": success("flat")},
    numbers={"action MAE": (validation("action_mae"), 3), "flow loss": (validation("flow_loss"), 3), **_SECONDS},
    modes={
        ("rollout", "policy"): "subtask first",
        ("rollout", "flat"): "without subtask",
        ("rollout", "mean_replay"): "mean trajectory",
    },
    dashed=success("mean_replay"),
)

_HEARD = {
    "policy": "named",
    "policy, swapped": "swapped: original",
    "policy, paraphrased": "paraphrased",
    "policy, empty": "empty",
}
DESK = Recipe(
    "009_desk",
    base="configs/desk.yaml",
    demo=Path("runs/desk"),
    command='make demo ARGS="--scene desk"',
    rollouts={
        "rollout": (
            *("--env", "Desk", "--tasks", f"[{','.join(INSTRUCTIONS)}]", "--modes", "[policy,mean_replay]"),
            *("--instructions", "[right,swapped,paraphrased,empty]", "--episodes", "16", "--videos", "0"),
        ),
        "several": (
            *("--env", "Desk", "--tasks", f"[{','.join(SEVERAL_STEPS)}]", "--modes", "[policy,flat]"),
            *("--episodes", "16", "--videos", "0"),
        ),
        "chains": (
            *("--env", "Desk", "--tasks", "[chain]", "--modes", "[policy,flat]", "--episodes", "32", "--videos", "0"),
        ),
    },
    shares={
        "named": success("policy"),
        "swapped: named": named("policy, swapped"),
        "swapped: original": success("policy, swapped"),
        "paraphrased": success("policy, paraphrased"),
        "empty": success("policy, empty"),
        "several steps": success("policy", "several"),
        "several steps, without subtask": success("flat", "several"),
    },
    numbers={
        "in a row": (in_a_row("policy"), 2),
        "in a row, without subtask": (in_a_row("flat"), 2),
        "action MAE": (validation("action_mae"), 3),
        **_SECONDS,
    },
    modes={
        **{("rollout", mode): heading for mode, heading in _HEARD.items()},
        ("rollout", "mean_replay"): "mean trajectory",
        ("several", "policy"): "several steps",
        ("several", "flat"): "several steps, without subtask",
    },
    dashed=success("mean_replay"),
)


def recipe_of(name: str) -> Recipe:
    """The recipe that an experiment differs from: that of its number, else 001."""
    return next((recipe for recipe in (DESK,) if recipe.name[:3] == name[:3]), METAWORLD)
