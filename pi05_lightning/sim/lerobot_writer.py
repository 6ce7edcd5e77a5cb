"""Writes simulated episodes as a LeRobot v3 dataset, many processes at once.

LeRobot's recorder is made for one robot in real time: it starts an encoder, appends to the same files and updates
image histograms frame by frame for every episode (120 ms for an episode of 16 frames of 64 px). Here a block of episodes is
one video file per camera, encoded where it was simulated, and one parquet file; metadata, schema and statistics are
LeRobot's own code, so that stock `LeRobotDataset(repo_id, root=…)` reads the result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.compute_stats import get_feature_stats
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.io_utils import write_info, write_table_one_row_group_per_episode
from lerobot.datasets.language import language_feature_info
from lerobot.datasets.utils import DEFAULT_CHUNK_SIZE, DEFAULT_DATA_PATH, DEFAULT_VIDEO_PATH

from pi05_lightning.types import Answer

ENCODER = RGBEncoderConfig(vcodec="h264", pix_fmt="yuv444p", g=2, crf=12, preset="veryfast")
"""Full chroma and little loss: at 64 px an object is a few pixels. GOP 2 as in LeRobot, for random access."""

_ROW = [("role", pa.string()), ("content", pa.string()), ("style", pa.string())]
_TAIL = [("camera", pa.string()), ("tool_calls", pa.list_(pa.string()))]
_PERSISTENT = pa.list_(pa.struct([*_ROW, ("timestamp", pa.float32()), *_TAIL]))
_EVENTS = pa.list_(pa.struct([*_ROW, *_TAIL]))


@dataclass(frozen=True)
class Episode:
    """What happened, one entry per frame: state, action f32[N 4], images {camera: uint8[N h w 3]}, words."""

    task: str
    state: np.ndarray
    action: np.ndarray
    images: dict[str, np.ndarray]
    subtasks: list[str]
    answers: list[tuple[Answer, ...]]


@dataclass(frozen=True)
class Block:
    """Episodes whose images are already in the block's video files, with the statistics of those images."""

    episodes: list[Episode]
    image_stats: list[dict[str, dict[str, np.ndarray]]]


def image_key(camera: str) -> str:
    """LeRobot's feature name of a camera."""
    return f"observation.images.{camera}"


def write_videos(root: Path, index: int, episodes: Sequence[Episode], fps: int) -> Block:
    """Encode one video per camera for block `index` under the dataset's root, and drop the images."""
    logging.getLogger("libav").setLevel(logging.ERROR)
    for camera in episodes[0].images:
        path = root / DEFAULT_VIDEO_PATH.format(video_key=image_key(camera), **_place(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(path, np.concatenate([episode.images[camera] for episode in episodes]), fps)
    stats = [{image_key(name): _image_stats(images) for name, images in e.images.items()} for e in episodes]
    return Block([Episode(e.task, e.state, e.action, {}, e.subtasks, e.answers) for e in episodes], stats)


def write_dataset(root: Path, name: str, features: dict[str, Any], fps: int, blocks: Any, splits: dict[str, str]) -> None:
    """Write the tables and the metadata beside the videos; `blocks` yields `Block`s in order, as they get ready."""
    meta = LeRobotDatasetMetadata.create(
        name, fps, {**features, **language_feature_info()}, robot_type="sawyer", root=root, metadata_buffer_size=10_000
    )
    for index, block in enumerate(blocks):
        _write_block(meta, index, block)
    for key in meta.video_keys:
        meta.update_video_info(key, ENCODER)
    meta.info.splits = splits
    write_info(meta.info, meta.root)
    meta.finalize()


def _place(index: int) -> dict[str, int]:
    return {"chunk_index": index // DEFAULT_CHUNK_SIZE, "file_index": index % DEFAULT_CHUNK_SIZE}


def _encode(path: Path, images: np.ndarray, fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODER.vcodec, fps, options=ENCODER.get_codec_options(1, as_strings=True))
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = ENCODER.pix_fmt
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _image_stats(images: np.ndarray) -> dict[str, np.ndarray]:
    """LeRobot's per-episode image statistics, in [0, 1], on every second pixel."""
    stats = get_feature_stats(images[:, ::2, ::2].transpose(0, 3, 1, 2), axis=(0, 2, 3), keepdims=True)
    return {k: v if k == "count" else np.squeeze(v / 255.0, axis=0) for k, v in stats.items()}


def _write_block(meta: LeRobotDatasetMetadata, index: int, block: Block) -> None:
    place, tables, start = _place(index), [], 0
    for episode, image_stats in zip(block.episodes, block.image_stats, strict=True):
        meta.save_episode_tasks([episode.task])
        columns = _columns(meta, episode)
        tables.append(_table(columns, episode, meta.fps))
        stats = {k: get_feature_stats(v, axis=0, keepdims=v.ndim == 1) for k, v in columns.items()} | image_stats
        where: dict[str, Any] = {f"data/{key}": value for key, value in place.items()}
        stop = start + len(episode.state)
        for key in meta.video_keys:
            where |= {f"videos/{key}/{name}": value for name, value in place.items()}
            where |= {f"videos/{key}/from_timestamp": start / meta.fps, f"videos/{key}/to_timestamp": stop / meta.fps}
        meta.save_episode(meta.total_episodes, len(episode.state), [episode.task], stats, where)
        start = stop
    path = meta.root / DEFAULT_DATA_PATH.format(**place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table_one_row_group_per_episode(pa.concat_tables(tables), path)


def _columns(meta: LeRobotDatasetMetadata, episode: Episode) -> dict[str, np.ndarray]:
    frames = np.arange(len(episode.state))
    return {
        "observation.state": episode.state,
        "action": episode.action,
        "timestamp": (frames / meta.fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full_like(frames, meta.total_episodes),
        "index": meta.total_frames + frames,
        "task_index": np.full_like(frames, meta.get_task_index(episode.task)),
    }


def _table(columns: dict[str, np.ndarray], episode: Episode, fps: int) -> pa.Table:
    arrays = {key: pa.array(list(value) if value.ndim > 1 else value) for key, value in columns.items()}
    subtasks = [
        _row("assistant", text, "subtask", timestamp=frame / fps)
        for frame, text in enumerate(episode.subtasks)
        if frame == 0 or text != episode.subtasks[frame - 1]
    ]
    arrays["language_persistent"] = pa.array([subtasks] * len(episode.subtasks), _PERSISTENT)
    arrays["language_events"] = pa.array([_events(answers) for answers in episode.answers], _EVENTS)
    return pa.table(arrays)


def _events(answers: tuple[Answer, ...]) -> list[dict[str, Any]]:
    rows = []
    for answer in answers:
        camera = image_key(answer.camera) if answer.camera else None
        rows.append(_row("user", answer.question, "vqa", camera=camera))
        rows.append(_row("assistant", answer.answer, "vqa", camera=camera))
    return rows


def _row(role: str, content: str, style: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, "style": style, "camera": None, "tool_calls": None, **more}
