"""Writes simulated episodes as a LeRobot v3 dataset.

LeRobot's recorder is made for one robot in real time: for every episode it starts an encoder, appends to files and
updates image histograms frame by frame (120 ms for an episode of 16 frames of 64 px). Here a block of episodes is one
film per camera, encoded where it was simulated, and one parquet file, language included. Metadata, schema and
statistics are LeRobot's own code, and stock `LeRobotDataset(repo_id, root=…)` reads the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.compute_stats import get_feature_stats
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.io_utils import write_info, write_table_one_row_group_per_episode
from lerobot.datasets.language import LANGUAGE_EVENTS, LANGUAGE_PERSISTENT, language_feature_info
from lerobot.datasets.utils import DEFAULT_CHUNK_SIZE, DEFAULT_DATA_PATH, DEFAULT_VIDEO_PATH

from pi05_lightning.sim import encoding
from pi05_lightning.sim.demonstrations.episodes import Episode
from pi05_lightning.types import Answer

INTERVENTION = "intervention"  # LeRobot's own column (rollout/context.py): whether somebody else than the policy acted
_TOOL_CALLS = ("tool_calls", pa.list_(pa.string()))
_EVENT = [("role", pa.string()), ("content", pa.string()), ("style", pa.string()), ("camera", pa.string()), _TOOL_CALLS]
_EVENTS = pa.list_(pa.struct(_EVENT))
_PERSISTENT = pa.list_(pa.struct([*_EVENT[:3], ("timestamp", pa.float32()), *_EVENT[3:]]))


@dataclass(frozen=True)
class Recording:
    """What a dataset is of: the names of its cameras and of the dims of state and action, image size, frame rate."""

    name: str
    cameras: Sequence[str]
    image_size: int
    fps: int
    state_names: Sequence[str]
    action_names: Sequence[str]
    robot_type: str
    of_a_policy: bool = False
    """Whether the frames say who acted."""


def image_key(camera: str) -> str:
    """LeRobot's feature name of a camera."""
    return f"observation.images.{camera}"


def video_path(root: Path, camera: str, block: int) -> Path:
    """Where the film of a block of episodes belongs."""
    return root / DEFAULT_VIDEO_PATH.format(video_key=image_key(camera), **_place(block))


def write_dataset(root: Path, what: Recording, blocks: Iterable[tuple[str, Sequence[Episode]]]) -> None:
    """Write tables and metadata under `root` (new), beside the films that are or will be at `video_path`.

    blocks: in order, each with the name of its split; their images are thinned out, for statistics only.
    """
    size = what.image_size
    image = {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {image_key(camera): image for camera in what.cameras}
    for key, names in (("observation.state", what.state_names), ("action", what.action_names)):
        if names:
            features[key] = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
    if what.of_a_policy:
        features[INTERVENTION] = {"dtype": "bool", "shape": (1,), "names": None}
    meta = LeRobotDatasetMetadata.create(
        repo_id=what.name,
        fps=what.fps,
        features=features | language_feature_info(),
        robot_type=what.robot_type,
        root=root,
        metadata_buffer_size=1000,
    )
    splits: dict[str, range] = {}
    for number, (split, block) in enumerate(blocks):
        first = splits[split].start if split in splits else meta.total_episodes
        _write_block(meta, number, block)
        splits[split] = range(first, meta.total_episodes)
    for key in meta.video_keys:
        meta.update_video_info(key, RGBEncoderConfig(**encoding.SETTINGS))
        film = meta.info.features[key]["info"]
        meta.info.features[key]["shape"] = (film["video.height"], film["video.width"], 3)  # as the simulator draws
    meta.info.splits = {name: f"{of.start}:{of.stop}" for name, of in splits.items()}
    write_info(meta.info, meta.root)
    meta.finalize()


def _place(block: int) -> dict[str, int]:
    return {"chunk_index": block // DEFAULT_CHUNK_SIZE, "file_index": block % DEFAULT_CHUNK_SIZE}


def _write_block(meta: LeRobotDatasetMetadata, number: int, block: Sequence[Episode]) -> None:
    place, tables, start = _place(number), [], 0
    for episode in block:
        meta.save_episode_tasks([episode.task])
        columns = _columns(meta, episode)
        tables.append(_table(columns, episode, meta.fps))
        stats = {key: get_feature_stats(column, axis=0, keepdims=column.ndim == 1) for key, column in columns.items()}
        stats |= {image_key(camera): _image_stats(images) for camera, images in episode.images.items()}
        stop = start + len(episode.action)
        where: dict[str, Any] = {f"data/{name}": value for name, value in place.items()} | dict(episode.outcome)
        for key in meta.video_keys:
            where |= {f"videos/{key}/{name}": value for name, value in place.items()}
            where |= {f"videos/{key}/from_timestamp": start / meta.fps, f"videos/{key}/to_timestamp": stop / meta.fps}
        meta.save_episode(meta.total_episodes, len(episode.action), [episode.task], stats, where)
        start = stop
    path = meta.root / DEFAULT_DATA_PATH.format(**place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table_one_row_group_per_episode(pa.concat_tables(tables), path)


def _columns(meta: LeRobotDatasetMetadata, episode: Episode) -> dict[str, np.ndarray]:
    frames = np.arange(len(episode.action))
    own = {"observation.state": episode.state, INTERVENTION: episode.intervention}
    return {key: column for key, column in own.items() if key in meta.features and column is not None} | {
        "action": episode.action,
        "timestamp": (frames / meta.fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full_like(frames, meta.total_episodes),
        "index": meta.total_frames + frames,
        "task_index": np.full_like(frames, meta.get_task_index(episode.task)),
    }


def _table(columns: dict[str, np.ndarray], episode: Episode, fps: int) -> pa.Table:
    arrays = {key: pa.array(list(column) if column.ndim > 1 else column) for key, column in columns.items()}
    said = episode.subtasks
    begins = [(i, text) for i, text in enumerate(said) if text is not None and (i == 0 or text != said[i - 1])]
    subtasks = [_row("assistant", text, "subtask", None, timestamp=i / fps) for i, text in begins]
    arrays[LANGUAGE_PERSISTENT] = pa.array([subtasks] * len(said), _PERSISTENT)
    arrays[LANGUAGE_EVENTS] = pa.array([_events(answers) for answers in episode.answers], _EVENTS)
    return pa.table(arrays)


def _events(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    rows = []
    for answer in answers:
        camera = image_key(answer.camera) if answer.camera else None
        rows.append(_row("user", answer.question, "vqa", camera))
        rows.append(_row("assistant", answer.answer, "vqa", camera))
    return rows


def _row(role: str, content: str, style: str, camera: str | None, **more: float) -> dict[str, Any]:
    return {"role": role, "content": content, "style": style, "camera": camera, "tool_calls": None, **more}


def _image_stats(images: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's statistics of the images of an episode, uint8[N h w 3], in [0, 1]."""
    stats = get_feature_stats(images.transpose(0, 3, 1, 2), axis=(0, 2, 3), keepdims=True)
    return {name: value if name == "count" else np.squeeze(value / 255.0, axis=0) for name, value in stats.items()}
