"""Frames to try a policy on: recorded ones, where its data still are, and made-up ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.types import Frame

RECORDED, MADE_UP = 3, 2
"""Frames of each kind."""


def recorded_frames(policy: Inference, data: str | LeRobotConfig | None, number: int = RECORDED) -> list[Frame]:
    """Frames of a LeRobot dataset, evenly spaced: of `data`, or of the robot's own where that is still there.

    ValueError for a dataset given as `data` that is not of this robot.
    """
    robot = policy.processor.robots[policy.robot]
    if data is None and not Path(robot.dataset, "meta", "info.json").is_file():
        return []
    config = data if isinstance(data, LeRobotConfig) else LeRobotConfig(data or robot.dataset, val_fraction=0)
    source = config.open("data", "train", policy.model.config.shapes)
    frames = [source[int(i)] for i in np.linspace(0, len(source) - 1, number)]
    seen = set(source.camera_names) == set(policy.inputs.cameras)
    dims = [0 if values is None else values.shape[-1] for values in (frames[0].state, frames[0].actions)]
    if seen and dims == [robot.state_dim, robot.action_dim]:
        return [Frame(images=frame.images, task=frame.task, state=frame.state) for frame in frames]
    if data is not None:
        raise ValueError(
            f"--data {config.path} is not of {policy.robot}: it has the cameras {sorted(source.camera_names)},"
            f" {dims[0]} dimensions of state and {dims[1]} of action; the policy has {sorted(policy.inputs.cameras)},"
            f" {robot.state_dim} and {robot.action_dim}"
        )
    return []  # the run read it in another way, which no checkpoint tells


def made_up_frames(policy: Inference) -> list[Frame]:
    """Random images and states, some of them beyond the range that the policy was trained on."""
    rng, robot = np.random.default_rng(0), policy.processor.robots[policy.robot]
    size, state = policy.model.config.vision.image_size, robot.normalize.state
    tasks = list(robot.tasks) or ["pick up the red_cube"]
    return [
        Frame(
            images={name: rng.integers(0, 256, (3, size, size), dtype=np.uint8) for name in policy.inputs.cameras},
            task=tasks[number % len(tasks)],
            state=(state.q01 + state.span * rng.uniform(-0.2, 1.2, len(state))).astype(np.float32),
        )
        for number in range(MADE_UP)
    ]
