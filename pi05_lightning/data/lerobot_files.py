"""The files of a LeRobot v3 dataset, read with pyarrow: metadata, episodes, tasks, and which episodes a split has.

meta/info.json                      fps, features, path templates, splits
meta/tasks.parquet                  sentence -> task_index
meta/subtasks.parquet               sentence -> subtask_index (older datasets)
meta/episodes/*/*.parquet           per episode: length, data file, and per video its file and start in it
data/*/*.parquet, videos/*/*/*.mp4  frames, many episodes to a file
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lightning.data.columns import is_text, real_numbers, whole_numbers
from pi05_lightning.data.open_files import check_open_files, reading_parquet
from pi05_lightning.data.outcomes import with_outcomes
from pi05_lightning.files.local import read_json

Sentence = tuple[Literal["task", "subtask"], str]


@dataclass(frozen=True)
class DataFiles:
    """The files under data/ that can be read, each with the episodes in it, i64 ascending; and why others cannot be."""

    episodes: dict[Path, np.ndarray]
    damaged: dict[Path, str]


@dataclass(frozen=True)
class LeRobotFiles:
    """One dataset's folder and what its metadata says."""

    root: Path
    info: dict[str, Any]
    episodes: pa.Table
    """One row per episode, by episode_index, without the per-episode statistics; with what `pi05 outcomes` was told."""

    @classmethod
    def open(cls, root: Path) -> LeRobotFiles:
        """Raises ValueError when the folder is no LeRobot v3 dataset, or its metadata is damaged."""
        root = root.absolute()  # arrow and ffmpeg take what is before a relative path's colon for a protocol
        if not (root / "meta" / "info.json").exists():
            raise ValueError(f"{root} is not a LeRobot dataset: it has no meta/info.json")
        info = read_json(root / "meta" / "info.json")
        version = str(info.get("codebase_version"))
        if not version.startswith("v3."):
            raise ValueError(
                f"{root} has LeRobot's format {version}, and v3 is needed: convert it{_conversion(root, version)}"
            )
        _check_rate(root, info.get("fps"))
        _check_features(root, info)
        parts = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
        if not parts:
            raise ValueError(f"{root} has no meta/episodes: it was not finalised, record it again or restore it")
        try:
            episodes = pa.concat_tables([read_episodes(part) for part in parts], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{root}/meta/episodes: its files have columns of different types ({error})") from error
        files = cls(root, info, episodes.sort_by("episode_index"))
        numbers = files.column("episode_index")
        if (np.diff(numbers) == 0).any():
            twice = numbers[:-1][np.diff(numbers) == 0].tolist()
            raise ValueError(f"{root}/meta/episodes lists the episodes {twice} more than once: leave one row for each")
        return replace(files, episodes=with_outcomes(files.episodes, root))

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    def sentences(self, table: str, column: str) -> dict[int, str]:
        """`meta/{table}.parquet` as {column_index: sentence}; empty when there is no such file.

        The sentences are the table's pandas index, whatever its name, as LeRobot reads it (`load_tasks` in its
        `datasets/io_utils.py`); without one of texts, as where rows were filtered, they are in `column`.  Raises
        ValueError when they are in neither, and for a number with two sentences.
        """
        path = self.root / "meta" / f"{table}.parquet"
        if not path.exists():
            return {}
        with reading_parquet(path, remedy="restore it from its origin"):
            rows = pq.read_table(path)
        index = [name for name in (rows.schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
        names = [
            name
            for name in (*sorted(index, key=column.__ne__), column)  # of several levels the one of that name
            if name in rows.column_names and is_text(rows.schema.field(name).type)
        ]
        if not names or f"{column}_index" not in rows.column_names:
            raise ValueError(
                f"{path} needs the columns {column}_index and {column} (or pandas' index in its place), of texts, and"
                f" has {_described(rows.schema)}: write it with LeRobot, or rename them"
            )
        numbers = whole_numbers(rows[f"{column}_index"], f"{path}, {column}_index").tolist()
        found: dict[int, str] = {}
        for number, sentence in zip(numbers, rows[names[0]].cast(pa.string()).to_pylist(), strict=True):
            if found.setdefault(number, sentence) != sentence:
                raise ValueError(
                    f"{path} has two sentences for {column}_index {number}, {found[number]!r} and {sentence!r}: leave"
                    " the right one"
                )
        return found

    @property
    def names_subtasks(self) -> bool:
        """Whether meta/subtasks.parquet is there. LeRobot's tools that edit datasets leave it out."""
        return (self.root / "meta" / "subtasks.parquet").exists()

    def cameras(self) -> list[str]:
        """Keys of the colour image features, in the dataset's order."""
        return [
            key
            for key, feature in self.features.items()
            if feature["dtype"] in ("video", "image") and not _is_depth(feature)
        ]

    def column(self, name: str) -> np.ndarray:
        """A column of whole numbers of the episode table, i64 per episode."""
        return whole_numbers(self.episodes.column(name), f"{self.root}/meta/episodes, {name}")

    def video_column(self, key: str, name: str) -> np.ndarray:
        """What the episode table says of a camera's videos, f64 per episode; NaN where it says nothing."""
        column = f"videos/{key}/{name}"
        if column not in self.episodes.column_names:
            return np.full(len(self.episodes), np.nan)
        return real_numbers(self.episodes.column(column), f"{self.root}/meta/episodes, {column}")

    @cached_property
    def data(self) -> DataFiles:
        """The data files, found as LeRobot finds them (`load_nested_dataset` in its `datasets/io_utils.py`).

        By what is in them: the file numbers in meta/episodes are wrong after some merges and conversions, where nobody
        noticed, since LeRobot does not follow them.
        """
        found: dict[Path, np.ndarray] = {}
        damaged: dict[Path, str] = {}
        for path in sorted((self.root / "data").glob("*/*.parquet")):
            try:
                column = pq.read_table(path, columns=["episode_index"]).column("episode_index")
                found[path] = np.unique(whole_numbers(column, f"{path}, episode_index"))
            except (pa.ArrowException, OSError, KeyError, ValueError) as error:
                check_open_files(error, path)
                damaged[path] = f"{path} is damaged ({error})"
        return DataFiles(found, damaged)

    def absent(self, episode: int) -> str:
        """Why no data file has the rows of an episode."""
        if self.data.damaged:
            return next(iter(self.data.damaged.values()))
        nowhere = f"no file in {self.root}/data has its rows"
        if "data_path" not in self.info or "data/file_index" not in self.episodes.column_names:
            return nowhere
        row = int(np.searchsorted(self.column("episode_index"), episode))
        named = {f"{part}_index": int(self.column(f"data/{part}_index")[row]) for part in ("chunk", "file")}
        path = self.root / self.info["data_path"].format(**named)
        return nowhere if path.exists() else f"{path} is missing"

    def video_path(self, key: str, chunk: int, file: int) -> Path:
        return self.root / self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def _check_rate(root: Path, fps: Any) -> None:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        raise ValueError(f"{root}/meta/info.json: fps is {fps!r}: write the number of frames a second")


def _check_features(root: Path, info: dict[str, Any]) -> None:
    features = info.get("features")
    if not isinstance(features, dict) or not features:
        raise ValueError(f"{root}/meta/info.json lacks features: restore it from its origin")
    for key, feature in features.items():
        if not isinstance(feature, dict) or not {"dtype", "shape"} <= feature.keys():
            raise ValueError(f"{root}/meta/info.json: the feature {key} lacks its dtype or shape: write them")
        if feature["dtype"] == "video" and not isinstance(info.get("video_path"), str):
            raise ValueError(f"{root}/meta/info.json: {key} is a video, and video_path does not say where: write it")


def _conversion(root: Path, version: str) -> str:
    """How to convert a dataset of an older format, by what LeRobot's converter needs and asks for."""
    if version != "v2.1":
        return " to v2.1 and then to v3 with the converters of LeRobot's older releases"
    name, folder = shlex.quote(f"{root.parent.name}/{root.name}"), shlex.quote(str(root))
    return (
        f" with\npython -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={name} --root={folder}"
        f" --push-to-hub=false\nwhich keeps the old one as {root.name}_old"
    )


def dim_names(feature: dict[str, Any]) -> list[str] | None:
    """The names of a vector's dims: LeRobot writes a list, lists by what they name or in a list, or each name's number.

    None where they are not as many as the dims.
    """
    found = _flat(feature.get("names") or ())
    return found if len(found) == feature["shape"][0] else None


def _flat(names: Any) -> list[str]:
    if isinstance(names, dict):
        numbers = list(names.values())
        names = sorted(names, key=names.__getitem__) if all(type(number) is int for number in numbers) else numbers
    if isinstance(names, list | tuple):
        return [name for part in names for name in _flat(part)]
    return [str(names)]


def read_episodes(path: Path) -> pa.Table:
    """The episodes of a file of meta/episodes, without their statistics. ValueError where it is damaged."""
    with reading_parquet(path, remedy="restore it from its origin"):
        names = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
        return pq.read_table(path, columns=names)


def _is_depth(feature: dict[str, Any]) -> bool:
    info = (feature.get("video_info") or {}) | (feature.get("info") or {})
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))
