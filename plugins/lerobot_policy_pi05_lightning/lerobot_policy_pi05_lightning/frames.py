"""LeRobot's batches as frames of ours, and what a dataset's files say of them beside what LeRobot hands over.

LeRobot's loader drops language columns (`lerobot_collate_fn`), and its processors pass on little but observations and
actions. What is left, episode and time, finds a frame's subtask, questions and answers in the dataset's files.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.robot import Robot
from pi05_lightning.data.sources.lerobot import LeRobotConfig, LeRobotSource
from pi05_lightning.data.sources.lerobot_columns import Columns
from pi05_lightning.types import Frame, Modality, Shapes
from pi05_lightning.weights.lerobot_plugin import camera_of
from pi05_lightning.weights.lerobot_processor import ACTION, STATE

log = logging.getLogger(__name__)

PLACE = ("episode_index", "timestamp", "index")
"""What a batch must say of where its frames are in the dataset."""


def frames_of(batch: Mapping[str, Any], cameras: Mapping[str, str], has_state: bool) -> list[Frame]:
    """The frames of a batch in real units; actions where it has some.

    cameras: image features with their cameras' names.  has_state: whether the policy has one.
    LeRobot makes floats in 0..1 of a camera's bytes, and they become bytes again.
    """
    images = {name: as_bytes(batch[key]) for key, name in cameras.items() if key in batch}
    state = batch[STATE].detach().float().cpu().numpy() if has_state and batch.get(STATE) is not None else None
    actions = None if batch.get(ACTION) is None else batch[ACTION].detach().float().cpu().numpy()
    rows = max(map(len, [*images.values(), *([] if state is None else [state])]), default=0)
    tasks = batch.get("task") or [""] * rows
    padded = f"{ACTION}_is_pad"
    is_pad = batch[padded].cpu().numpy() if padded in batch else None
    if actions is not None and is_pad is None:
        is_pad = np.zeros(actions.shape[:2], dtype=bool)
    return [
        Frame(
            images={name: image[row] for name, image in images.items()},
            task=tasks[row],
            state=None if state is None else state[row],
            actions=None if actions is None else actions[row],
            action_is_pad=None if is_pad is None else is_pad[row],
        )
        for row in range(rows)
    ]


def as_bytes(images: Tensor) -> np.ndarray:
    """u8[B 3 h w] of images in 0..1, or of bytes."""
    pixels = images.detach() if images.dtype == torch.uint8 else (images.detach() * 255).round().clamp(0, 255).byte()
    return pixels.cpu().numpy()


def camera_names(keys: list[str]) -> dict[str, str]:
    """Image features with their cameras' names.

    Raises ValueError for one that LeRobot's processors drop, and where two share a name.
    """
    if lost := [key for key in keys if not key.startswith("observation.")]:
        raise ValueError(f"LeRobot's processors pass on `observation.…` alone: rename {', '.join(lost)}")
    names = {key: camera_of(key) for key in keys}
    if len(set(names.values())) < len(names):
        raise ValueError(f"two image features share the last part of their names: {', '.join(names)}; rename one")
    return names


def depth_cameras(root: Path, keys: Collection[str]) -> list[str]:
    """Of image features, those that a dataset has, and not in colour."""
    files = LeRobotFiles.open(root)
    return [key for key in keys if key in files.features and key not in files.cameras()]


class Taught:
    """What a LeRobot dataset says of its frames in words, and the robot that its numbers are of.

    Statistics are of the episodes that meta/info.json declares for training, as in `pi05 fit`.
    Raises ValueError for data that cannot be trained on, with its place.
    """

    def __init__(self, root: Path, cameras: Mapping[str, str], shapes: Shapes, **options: Any) -> None:
        if missing := [key for key in cameras if key not in LeRobotFiles.open(root).features]:
            raise ValueError(
                f"the dataset has no {', '.join(missing)}, and LeRobot tells a policy nothing of --rename_map: give"
                " --policy.type and --policy.init_from instead of --policy.path, which take the dataset's cameras"
            )
        config = LeRobotConfig(path=str(root), cameras=dict(cameras), val_fraction=0, **options)
        source = config.open("robot", "train", shapes)
        robot = source.checked_robot()
        assert robot is not None  # it has actions
        self.robot: Robot = replace(robot, looks=source.looks())
        self.share = {modality: len(source.indices(modality)) / len(source) for modality in Modality}
        """Of the frames, those that can serve as each modality."""
        self._parts = [_part(source)]
        _, _, episodes = self._parts[0]
        others = len(source.files.column("episode_index")) - len(episodes)
        if others:
            log.warning(
                "%s declares %d of its episodes for other things than training, and LeRobot trains on them too: name"
                " those to train on as --dataset.episodes",
                root / "meta" / "info.json",
                others,
            )
            for split in ("val", "test"):
                self._parts.append(_part(config.open("robot", split, shapes)))

    def frames(self, frames: list[Frame], batch: Mapping[str, Any]) -> list[Frame]:
        """The frames of a batch with their subtasks, questions and answers."""
        if missing := [name for name in PLACE if name not in batch]:
            raise ValueError(f"the batch does not say where its frames are: it lacks {', '.join(missing)}")
        episodes, times = batch["episode_index"].reshape(-1).tolist(), batch["timestamp"].reshape(-1).tolist()
        said = [self._said(int(episode), time) for episode, time in zip(episodes, times, strict=True)]
        return [replace(frame, **words) for frame, words in zip(frames, said, strict=True)]

    def _said(self, episode: int, time: float) -> dict[str, Any]:
        """Subtask, whether it can be learned, and answers of the frame at a time of an episode."""
        for columns, teaches, episodes in self._parts:
            if episode in episodes:
                rows = episodes[episode]
                row = rows.start + int(np.abs(columns.timestamp[rows] - time).argmin())
                return {
                    "subtask": columns.subtask[row],
                    "subtask_is_target": bool(teaches[row]),
                    "answers": columns.answers[row],
                }
        raise ValueError(
            f"episode {episode} is in none of the parts that meta/info.json declares: leave it out with"
            " --dataset.episodes"
        )


def _part(source: LeRobotSource) -> tuple[Columns, np.ndarray, dict[int, slice]]:
    """What a part of a dataset says of its rows, whose subtasks can be learned, and the rows of each episode."""
    numbers, first, count = np.unique(source.columns.episode, return_index=True, return_counts=True)
    episodes = {int(n): slice(int(f), int(f + c)) for n, f, c in zip(numbers, first, count, strict=True)}
    return source.columns, source.teaches_subtask, episodes
