"""The modes of a rollout that a policy, a simulator and demonstrations allow."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pi05_lightning.acting import Acting
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.robot import Robot
from pi05_lightning.files.local import shown
from pi05_lightning.policy import Pi05Policy
from pi05_lightning.sim.baselines import Demonstrations, check_replay
from pi05_lightning.sim.environment import EnvironmentConfig
from pi05_lightning.sim.modes import DELAYED, MODES, Mode, acting_in

log = logging.getLogger(__name__)


def modes_of(
    policy: Pi05Policy,
    env: EnvironmentConfig,
    tasks: Sequence[str],
    wanted: Sequence[Mode] | None,
    delays: tuple[int, ...],
    demonstrations: Demonstrations | None,
) -> tuple[Mode, ...]:
    """The modes to run. ValueError for wanted ones that cannot be, and for delays that none has or a chunk is short of.

    demonstrations: what mean_replay replays, if it is here.
    """
    no_replay, how = None, policy.acting
    if demonstrations is None:
        no_replay = "the demonstrations are not here: say where with --dataset"
    elif wanted is None or "mean_replay" in wanted:
        robot = policy.processor.robots[policy.robot]
        try:
            check_replay(demonstrations, robot, {task: env.sentences(task) for task in tasks})
        except ValueError as error:
            no_replay = str(error)
    if no_replay is not None and wanted is None:
        log.warning("the mode mean_replay is left out: %s", no_replay)
    fast = policy.abilities.fast and how.actions == "flow"
    modes = available_modes(env, no_replay, wanted, policy.hierarchical, fast, delayed_modes(policy, how, delays))
    if {*modes} & {*DELAYED}:
        acting_in("async", how, delays).executed(policy.horizon)  # chunks last as long as any delay
    elif delays:
        raise ValueError(f"delays: of the modes {' and '.join(DELAYED)} alone: add one to --modes, or leave them out")
    return modes


def available_modes(
    env: EnvironmentConfig,
    no_replay: str | None,
    wanted: Sequence[Mode] | None,
    subtasks: bool = True,
    fast: bool = True,
    delayed: Sequence[Mode] = (),
) -> tuple[Mode, ...]:
    """The wanted modes; by default all but those whose expert or demonstrations are not there.

    no_replay: why the mode mean_replay cannot be, if it cannot.
    By default `flat` is left out too where the policy predicts no subtasks, as it acts on the task anyhow; `fast` where
    it says no FAST tokens, or says them anyhow; and of the modes with a delay all that are not in `delayed`.

    Raises ValueError when such a one is wanted.
    """
    missing = {}
    if not env.has_expert:
        missing["expert"] = f"{type(env).__name__} has no scripted expert"
    if no_replay is not None:
        missing["mean_replay"] = no_replay
    for mode in wanted or ():
        if mode in missing:
            raise ValueError(f"mode {mode}: {missing[mode]}, or leave the mode out")
    left_out = {*missing} | ({*DELAYED} - {*delayed})
    left_out |= {mode for mode, able in (("flat", subtasks), ("fast", fast)) if not able}
    return tuple(wanted or (mode for mode in MODES if mode not in left_out))


def delayed_modes(policy: Pi05Policy, how: Acting, delays: tuple[int, ...]) -> list[Mode]:
    """Modes with a delay that the policy is able to: none without `delays`, and rtc only where it was trained to."""
    if not delays:
        return []
    most, asked = policy.abilities.max_delay, acting_in("rtc", how, delays).inference_delay
    if policy.abilities.flow and (most is None or asked <= most):
        return list(DELAYED)
    log.warning(
        "the mode rtc is left out: the policy was not trained to go on from %d actions (model.rtc_max_delay)", asked
    )
    return ["async"]


def demonstrations_of(robot: Robot, dataset: str | None) -> Demonstrations | None:
    """What a robot was trained on, if it is on this machine.

    dataset: a folder or Hub id to take instead, which is downloaded where it is not here.
    Raises ValueError for one that is no LeRobot v3 dataset.
    """
    try:
        path = find_dataset(robot.dataset, local_only=True) if dataset is None else find_dataset(dataset)
    except ValueError as error:
        if dataset is None:
            return None
        raise ValueError(f"dataset: {error}") from error
    # LeRobot may have downloaded its meta/ alone
    if (path / "meta" / "tasks.parquet").is_file() and any((path / "data").rglob("*.parquet")):
        return Demonstrations(str(path), robot.action_keys)
    if dataset is not None:
        raise ValueError(
            f"dataset: {shown(path)} is no LeRobot v3 dataset, as it has not both meta/tasks.parquet and data/"
        )
    return None
