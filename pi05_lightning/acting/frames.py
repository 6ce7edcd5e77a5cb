"""Frames to try a policy on: recorded ones, where its data still are, and made-up ones."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

import numpy as np

from pi05_lightning.acting.inference import Inference
from pi05_lightning.data.columns import evenly_spaced
from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.find_dataset import find_dataset
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.types import Frame

log = logging.getLogger(__name__)

RECORDED_FRAMES, MADE_UP_FRAMES = 3, 2
"""Frames of each kind."""


def dataset_config(
    robot: Robot,
    path: str,
    cameras: dict[str, str] | None = None,
    state_keys: list[str] | None = None,
    action_keys: list[str] | None = None,
) -> LeRobotConfig:
    """How a dataset is read to try a policy, of a robot, on it: by default its own features.

    What cannot be trained on is left out. Images of every kind, frames without an instruction and timestamps that are
    off by up to half a frame are taken: a policy may have been trained so.
    """
    return LeRobotConfig(
        path,
        task=next(iter(robot.tasks), None),
        tolerance_s=0.49 / LeRobotFiles.open(find_dataset(path)).fps,
        cameras=cameras,
        state_keys=(list(robot.state_keys) if robot.state_dim else []) if state_keys is None else state_keys,
        action_keys=list(robot.action_keys) if action_keys is None else action_keys,
        val_fraction=0,
        convert_images=True,
        on_bad_sample="skip",
    )


def recorded_frames(policy: Inference, data: LeRobotConfig | None, number: int = RECORDED_FRAMES) -> list[Frame]:
    """Frames of a LeRobot dataset, evenly spaced: of `data`, or of the robot's own where that can still be read.

    ValueError for a dataset given as `data` that cannot be read, or is not of this robot.
    """
    if data is not None:
        return _frames_of(policy, data, number)
    robot = policy.processor.robots[policy.robot]
    own = str(Path(robot.dataset).expanduser())
    if not Path(own, "meta", "info.json").is_file():
        return []
    try:
        return _frames_of(policy, dataset_config(robot, own), number)
    except ValueError as error:  # the run may have read it in another way, which no checkpoint tells
        log.warning("no frames of the policy's own data, %s: %s", own, error)
        return []


def _frames_of(policy: Inference, data: LeRobotConfig, number: int) -> list[Frame]:
    robot = policy.processor.robots[policy.robot]
    source = data.open("data", "train", policy.model.config.shapes)
    frames = list[Frame]()
    for place in evenly_spaced(len(source), number):
        with suppress(BadSample):  # an image that does not decode shows only now
            frames.append(source[int(place)])
    if not frames:
        raise ValueError(f"{data.path}: none of {number} frames can be read: restore its images")
    dims = [0 if values is None else values.shape[-1] for values in (frames[0].state, frames[0].actions)]
    needed, every = set(policy.inputs.needed_cameras), set(policy.inputs.cameras)
    if not needed <= set(source.camera_names) <= every or dims != [robot.state_dim, robot.action_dim]:
        raise ValueError(
            f"{data.path} is not of {policy.robot}: it has the cameras {sorted(source.camera_names)}, {dims[0]}"
            f" dimensions of state and {dims[1]} of action; the policy has {sorted(every)},"
            f" {robot.state_dim} and {robot.action_dim}"
        )
    return [Frame(images=frame.images, task=frame.task, state=frame.state) for frame in frames]


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
        for number in range(MADE_UP_FRAMES)
    ]
