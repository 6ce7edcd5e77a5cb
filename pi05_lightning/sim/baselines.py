"""What a policy has to beat: replay of the mean demonstration, which looks at nothing, and uniformly random actions.

And the scripted expert, which knows where everything is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.dataset as ds

from pi05_lightning.data.chosen_episodes import choose_episodes
from pi05_lightning.data.columns import vectors
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.prompt import clean_task
from pi05_lightning.data.robot import Robot
from pi05_lightning.sim.course import Course
from pi05_lightning.sim.environment import Demonstrator, Environment, act_as_expert, same_rate
from pi05_lightning.sim.trials import Clock, Trial


@dataclass(frozen=True)
class Demonstrations:
    """What is replayed.  path: a LeRobot v3 folder.  action_keys: its features that make up the action."""

    path: str
    action_keys: tuple[str, ...]


def check_replay(shown: Demonstrations, robot: Robot, sentences: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for demonstrations that a robot cannot replay, or not at all tasks.

    sentences: by task its instruction, and the same in other words; nothing of tasks that only a simulator can tell.
    """
    files, remedy = LeRobotFiles.open(Path(shown.path)), "give its own demonstrations with --dataset"
    if not same_rate(files.fps, robot.fps):
        raise ValueError(
            f"{shown.path} was recorded at {files.fps:g} frames per second, and the policy was trained at"
            f" {robot.fps:g}: {remedy}"
        )
    if missing := [key for key in shown.action_keys if key not in files.features]:
        raise ValueError(f"{shown.path} has no {', '.join(missing)}, of which the policy's action is made: {remedy}")
    if (width := sum(widths_of(files, shown).values())) != robot.action_dim:
        raise ValueError(f"{shown.path} has actions of {width} dims, and the policy {robot.action_dim}: {remedy}")
    found = {clean_task(sentence) for sentence in files.sentences("tasks", "task").values()}
    if never := [task for task, said in sentences.items() if said and clean_task(said[0]) not in found]:
        raise ValueError(f"{shown.path} has no demonstration of {', '.join(never)}: {remedy}, or other --tasks")


def widths_of(files: LeRobotFiles, shown: Demonstrations) -> dict[str, int]:
    """Dims of each feature that makes up the action."""
    return {key: math.prod(files.features[key]["shape"]) for key in shown.action_keys}


def mean_trajectory(shown: Demonstrations, task: str) -> np.ndarray:
    """Mean action at each time step over the training episodes of a task that last that long: f32[N A].

    Time counts from the task's first frame in an episode. A step that no episode has holds the action before it.

    task: the instruction, underscores and spaces around it as a prompt has them.
    Raises ValueError when no training episode has this task.
    """
    files = LeRobotFiles.open(Path(shown.path))
    tasks = files.sentences("tasks", "task")
    numbers = [number for number, sentence in tasks.items() if clean_task(sentence) == clean_task(task)]
    if not numbers:
        known = ", ".join(map(repr, tasks.values()))
        raise ValueError(f"{shown.path} has no task {task!r}: it has {known}")
    episodes = choose_episodes(files, "train", 0.0, None)
    rows = ds.dataset(files.root / "data").to_table(
        columns=["episode_index", "frame_index", *shown.action_keys],
        filter=ds.field("task_index").isin(numbers) & ds.field("episode_index").isin(episodes),
    )
    if not rows.num_rows:
        raise ValueError(f"{shown.path} has no training episode of {task!r}")
    episode, frame = rows["episode_index"].to_numpy(), rows["frame_index"].to_numpy()
    begin = np.full(episode.max() + 1, frame.max())
    np.minimum.at(begin, episode, frame)
    step = frame - begin[episode]
    widths = widths_of(files, shown).items()
    parts = [vectors(rows[key], width, f"{shown.path}, {key}")[0] for key, width in widths]
    actions = np.concatenate(parts, axis=1)
    total, count = np.zeros((step.max() + 1, actions.shape[1])), np.bincount(step)
    np.add.at(total, step, actions)
    last = np.maximum.accumulate(np.where(count, np.arange(len(count)), 0))
    return (total / np.maximum(count, 1)[:, None])[last].astype(np.float32)


def run_baseline(course: Course, clock: Clock, replay: Callable[[str], np.ndarray] | None = None) -> None:
    """One episode of the scripted expert, of uniformly random actions, or of a trajectory.

    replay: instruction -> the trajectory f32[N A].
    """
    with course.simulating():
        course.begin()
    env, trial = course.env, course.trial
    rng = np.random.default_rng(trial.draws)
    sentence, since = env.sentence, 0
    while not course.result.over:
        taken = course.result.decisions
        if env.sentence != sentence:
            sentence, since = env.sentence, taken
        if trial.mode == "expert":
            step = partial(act_as_expert, cast("Demonstrator", env))
        elif replay is None:
            step = partial(env.step, _random_action(env, trial, rng))
        else:
            trajectory = replay(sentence)
            step = partial(env.step, trajectory[min(taken - since, len(trajectory) - 1)])
        with course.simulating():
            course.take(step, clock)


def _random_action(env: Environment, trial: Trial, rng: np.random.Generator) -> np.ndarray:
    if not np.isfinite([env.action_low, env.action_high]).all():
        raise ValueError(f"the actions of {trial.task} have no bounds to draw from: leave out the mode random")
    return rng.uniform(env.action_low, env.action_high)
