"""What experiments begin with: a recipe on a scene, the rollouts of its policies, and what they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pi05_lightning.sim.desk.tasks import INSTRUCTIONS, SEVERAL_STEPS

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

Result = dict[str, Any]
"""{rollout: {success: {mode: {task: [successes, trials]}}, per_minute, swapped, chains}},
validation: {metric: value},  cpu_seconds: of the training"""
Measure = Callable[[Result], float | None]


@dataclass(frozen=True)
class Recipe:
    """An experiment that others differ from.

    name      of its folder, whose number those begin with that differ from it: 012a_… from 012_…
    base      the configurations that it goes on from, in order
    demo      where a demo of its scene has its data and its tokenizer, and the command that makes it
    parts     {name: arguments of `pi05`}, in order, after the training and its validation; {run}, {data} and {seed}
              stand for the seed's folder, the demo's data and the seed
    rollouts  {name: what a rollout wrote, in the seed's folder}
    shares    {heading: share in [0, 1]}
    numbers   {heading: (measure, digits)}; the first is drawn beside the shares
    modes     {(rollout, mode): heading} of the table of tasks
    dashed    the share that is the same for every training
    """

    name: str
    base: tuple[str, ...]
    demo: Path
    command: str
    parts: Mapping[str, tuple[str, ...]]
    rollouts: Mapping[str, str]
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


def per_minute(rollout: str) -> Measure:
    """Successes in a minute of simulated time."""
    return lambda result: result.get(rollout, {}).get("per_minute", {}).get("policy")


def validation(metric: str) -> Measure:
    """Of robot/continuous_robot_actions."""
    return lambda result: result["validation"].get(metric)


def _rate(counts: Iterable[tuple[int, int]]) -> float | None:
    rates = [successes / trials for successes, trials in counts]
    return fmean(rates) if rates else None


def _rolled_out(name: str, policy: str, *options: str) -> tuple[str, ...]:
    return ("rollout", policy, "--out", f"{{run}}/{name}", "--videos", "0", *options)


_SECONDS: Mapping[str, tuple[Measure, int]] = {"CPU seconds": (lambda result: result["cpu_seconds"], 0)}

METAWORLD = Recipe(
    "001_metaworld",
    base=("configs/tiny.yaml",),
    demo=Path("runs/demo"),
    command="make demo",
    # as the demo's, without the baselines that are the same for every training
    parts={"rollout": _rolled_out("rollout", "{run}", "--modes", "[policy,flat,mean_replay]")},
    rollouts={"rollout": "rollout/rollout.json"},
    shares={"subtask first": success("policy"), "without subtask": success("flat")},
    numbers={"action MAE": (validation("action_mae"), 3), "flow loss": (validation("flow_loss"), 3), **_SECONDS},
    modes={
        ("rollout", "policy"): "subtask first",
        ("rollout", "flat"): "without subtask",
        ("rollout", "mean_replay"): "mean trajectory",
    },
    dashed=success("mean_replay"),
)


def _at_desk(name: str, tasks: Iterable[str], *options: str) -> tuple[str, ...]:
    return _rolled_out(name, "{run}", "--env", "Desk", "--tasks", f"[{','.join(tasks)}]", *options)


def _listening(modes: str, episodes: str) -> dict[str, tuple[str, ...]]:
    """Parts: whether it does what it is told, and tasks of several steps."""
    told = ("--instructions", "[right,swapped,paraphrased,empty]")
    return {
        "rollout": _at_desk("rollout", INSTRUCTIONS, "--modes", modes, "--episodes", episodes, *told),
        "several": _at_desk("several", SEVERAL_STEPS, "--modes", "[policy,flat]", "--episodes", episodes),
    }


_HEARD = {
    "policy": "named",
    "policy, swapped": "swapped: original",
    "policy, paraphrased": "paraphrased",
    "policy, empty": "empty",
}
DESK = Recipe(
    "009_desk",
    base=("configs/desk.yaml",),
    demo=Path("runs/desk"),
    command='make demo ARGS="--scene desk"',
    parts={
        **_listening("[policy,mean_replay]", "16"),
        "chains": _at_desk("chains", ("chain",), "--modes", "[policy,flat]", "--episodes", "32"),
    },
    rollouts={name: f"{name}/rollout.json" for name in ("rollout", "several", "chains")},
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
_ABLATED = ("rollout", "several")  # of the desk's rollouts
DESK_ABLATIONS = replace(
    DESK,
    name="012_desk_ablations",
    parts=_listening("[policy]", "8"),
    rollouts={name: DESK.rollouts[name] for name in _ABLATED},
    numbers={heading: number for heading, number in DESK.numbers.items() if "in a row" not in heading},
)


_CORRECTED = ("--episodes", "80", "--attempt_seconds", "4", "--corrections", "8")
_WINDOW = ("--tasks", "[window-open-v3]", "--max_seconds", "2.5")
_TRIED = ("--modes", "[policy]", "--episodes", "200", *_WINDOW)
_LEARNED = "{run}/rounds/recap/round_2/fit"
_TOLD = {
    "told negative": ("--advantage", "negative"),
    "told nothing": ("--advantage", "none"),
    "guidance 1.5": ("--guidance", "1.5"),
    "guidance 2.5": ("--guidance", "2.5"),
}
_OTHERWISE = {
    "without omission": ("--advantage_omission", "0"),
    "10 % positive": ("--first_positive_share", "0.1"),
    "50 % positive": ("--first_positive_share", "0.5"),
}


def _rounds(name: str, *options: str, attempts: tuple[str, ...] = _CORRECTED) -> tuple[str, ...]:
    of_seed = ("--policy", "{run}", "--demonstrations", "[{data}/robot]", "--seed", "{seed}")
    return ("experience", f"{{run}}/{name}", *of_seed, *attempts, "--test_episodes", "200", *_WINDOW, *options)


def _folder(heading: str) -> str:
    return heading.replace(" %", "").replace(" ", "_")


_METHODS = {"RECAP": "recap", "DAgger": "dagger", "successes": "successes"}


def _learned(rounds: str, method: str, number: int) -> str:
    """The rollout of a method's policy after a round."""
    return f"{rounds}/{_METHODS[method]}/round_{number}/rollout/rollout.json"


_ATTEMPTS_OF_RECAP = "[{run}/rounds/attempts_1/robot,{run}/rounds/recap/attempts_2/robot]"
_ROUNDS = {
    "base": "rounds/base/rollout.json",
    **{f"{method} {number}": _learned("rounds", method, number) for method in _METHODS for number in (1, 2)},
    "demonstrations": "rounds/demonstrations/round_1/rollout/rollout.json",
    # with what RECAP 2 learned from
    "DAgger, same attempts": _learned("same_attempts", "DAgger", 1),
    "successes, same attempts": _learned("same_attempts", "successes", 1),
    # without the expert
    "RECAP 1, alone": _learned("alone", "RECAP", 1),
    "successes 1, alone": _learned("alone", "successes", 1),
}
EXPERIENCE = Recipe(
    "010_experience",
    base=("configs/tiny.yaml", "experiments/001_metaworld/config.yaml"),
    demo=Path("runs/few"),
    command="pi05 collect runs/few/data --episodes 10 --val_episodes 4 && "
    "pi05 tokenizer runs/few/data/robot --out runs/few/fast --horizon 8",
    parts={
        "rounds": _rounds("rounds", "--methods", "[recap,dagger,successes,demonstrations]"),
        "same_attempts": _rounds(
            *("same_attempts", "--methods", "[dagger,successes]", "--rounds", "1"),
            *("--attempts", _ATTEMPTS_OF_RECAP),
        ),
        "alone": _rounds("alone", "--methods", "[recap,successes]", "--rounds", "1", attempts=("--episodes", "200")),
        **{_folder(told): _rolled_out(_folder(told), _LEARNED, *_TRIED, *how) for told, how in _TOLD.items()},
        **{
            _folder(other): _rounds(_folder(other), "--methods", "[recap]", "--rounds", "1", *how)
            for other, how in _OTHERWISE.items()
        },
    },
    rollouts={
        **_ROUNDS,
        **{told: f"{_folder(told)}/rollout.json" for told in _TOLD},
        **{other: f"{_folder(other)}/recap/round_1/rollout/rollout.json" for other in _OTHERWISE},
    },
    shares={heading: success("policy", heading) for heading in _ROUNDS},
    numbers={
        "RECAP 2, per minute": (per_minute("RECAP 2"), 1),
        "DAgger 2, per minute": (per_minute("DAgger 2"), 1),
    },
    modes={(rollout, "policy"): rollout for rollout in (*_ROUNDS, *_TOLD, *_OTHERWISE)},
)
_STEPS = {f"{number} steps" if number > 1 else "1 step": number for number in (1, 2, 5, 10, 20)}
SAMPLING = Recipe(
    "011_cheaper_sampling",
    base=EXPERIENCE.base,
    demo=EXPERIENCE.demo,
    command=EXPERIENCE.command,
    parts={
        "distance": ("experiments/011_cheaper_sampling/distance.py", "{run}", "{run}/distance.json"),
        **{
            f"steps_{number}": _rolled_out(
                *(f"steps_{number}", "{run}", "--modes", "[policy]", "--episodes", "50", "--num_steps", str(number))
            )
            for number in _STEPS.values()
        },
    },
    rollouts={heading: f"steps_{number}/rollout.json" for heading, number in _STEPS.items()},
    shares={heading: success("policy", heading) for heading in _STEPS},
    numbers={"per minute, 10 steps": (per_minute("10 steps"), 1), "per minute, 2 steps": (per_minute("2 steps"), 1)},
    modes={(heading, "policy"): heading for heading in _STEPS},
)
RECIPES = (METAWORLD, DESK, EXPERIENCE, SAMPLING, DESK_ABLATIONS)


def recipe_of(name: str) -> Recipe:
    """The recipe that an experiment differs from: that of its number, else 001."""
    return next((recipe for recipe in RECIPES if recipe.name[:3] == name[:3]), METAWORLD)
