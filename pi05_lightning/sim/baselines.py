"""What a policy has to beat: replay of the mean demonstration, which looks at nothing.

The other two baselines need no data: uniformly random actions, and the scripted expert (`ExpertEnvironment`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.dataset as ds

from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.sim.environment import NoDemonstrations, same_rate


def check_rate(dataset: Path, fps: float) -> None:
    """Raises ValueError, with both rates, for demonstrations at another rate than the policy acts at."""
    if not same_rate(recorded := LeRobotFiles.open(dataset).fps, fps):
        raise ValueError(
            f"mode mean_replay: {dataset} was recorded at {recorded:g} frames per second, and the policy was trained at"
            f" {fps:g}: give its own demonstrations with --dataset, or leave the mode out"
        )


def mean_trajectory(dataset: Path, task: str) -> np.ndarray:
    """Mean action at each time step over the training episodes of a task that last that long: f32[N A].

    Time counts from the task's first frame in an episode. A step that no episode has holds the action before it.

    dataset: a LeRobot v3 folder;  task: the instruction, as the dataset has it.
    Raises NoDemonstrations when no training episode has this task.
    """
    files = LeRobotFiles.open(dataset)
    tasks = {sentence: number for number, sentence in files.sentences("tasks", "task").items()}
    if task not in tasks:
        raise NoDemonstrations(f"{dataset} has no task {task!r}: it has {', '.join(map(repr, tasks))}")
    episodes = files.choose("train", 0.0, None)
    rows = ds.dataset(files.root / "data").to_table(
        columns=["episode_index", "frame_index", "action"],
        filter=(ds.field("task_index") == tasks[task]) & ds.field("episode_index").isin(episodes),
    )
    if not rows.num_rows:
        raise NoDemonstrations(f"{dataset} has no training episode of {task!r}")
    episode, frame = rows["episode_index"].to_numpy(), rows["frame_index"].to_numpy()
    begin = np.full(episode.max() + 1, frame.max())
    np.minimum.at(begin, episode, frame)
    step, actions = frame - begin[episode], np.stack(rows["action"].to_numpy())
    total, count = np.zeros((step.max() + 1, actions.shape[1])), np.bincount(step)
    np.add.at(total, step, actions)
    known = np.maximum.accumulate(np.where(count, np.arange(len(count)), 0))
    return (total / np.maximum(count, 1)[:, None])[known].astype(np.float32)
