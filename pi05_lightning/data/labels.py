"""What was found out about a dataset's frames later: a column file beside it. It fits the data, or it is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pi05_lightning.data.attempts import INTERVENTIONS
from pi05_lightning.data.columns import real_numbers, rows_at
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.open_files import reading_parquet
from pi05_lightning.data.outcomes import NEXT_SUCCESS, SUCCESS
from pi05_lightning.files.local import read_json, replacing

Sign = Literal["positive", "negative"]
RETURN, POSITIVE = "return", "positive"
"""Columns: what is left of the episode, in [-1, 0]; whether the advantage is positive."""
VALUE_FILE = "value.json"
"""Within a value's run: the hash of its weights, which labels carry too."""
_ABOUT = b"pi05_labels"
_HASHED = ("episode_index", "frame_index", "task_index", "action", "observation.state", NEXT_SUCCESS, *INTERVENTIONS)
_REMEDY = "make them with `pi05 value label`"


@dataclass(frozen=True)
class Labels:
    """Columns over frames, each known by its episode and its number there: i64[N], i64[N], and [N] by name.

    about: how they were made, plain types; `value` and `sha256` are the value's run and the hash of its weights.
    """

    episode: np.ndarray
    frame: np.ndarray
    columns: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def write(self, path: Path, files: LeRobotFiles) -> None:
        """For this dataset, of which nothing changes."""
        about = {**self.about, "dataset": fingerprint(files)}
        table = pa.table({"episode_index": self.episode, "frame_index": self.frame, **self.columns})
        with replacing(path) as part:
            pq.write_table(table.replace_schema_metadata({_ABOUT: json.dumps(about)}), part)

    @classmethod
    def read(cls, path: Path, files: LeRobotFiles) -> Labels:
        """Raises ValueError for a file that is not there, is none of ours, or fits dataset or value no more.

        And for numbers that are not finite, and nulls.
        """
        if not path.is_file():
            raise ValueError(f"labels: {path} does not exist: {_REMEDY}")
        with reading_parquet(f"labels: {path}", remedy=f"{_REMEDY} again"):
            table = pq.read_table(path)
        if _ABOUT not in (table.schema.metadata or {}):
            raise ValueError(f"labels: {path} is no file of labels, which say what they are of: {_REMEDY}")
        about = json.loads(table.schema.metadata[_ABOUT])
        if about["dataset"] != fingerprint(files):
            raise ValueError(
                f"labels: {path} is of another dataset than {files.root}, or that was changed since: {_REMEDY} again"
            )
        now = read_json(Path(about["value"], VALUE_FILE), default={}).get("sha256") if about.get("value") else None
        if now is not None and now != about["sha256"]:
            raise ValueError(
                f"labels: {path} is older than the value in {about['value']}, which was fitted again: {_REMEDY} again"
            )
        columns = {name: table.column(name) for name in table.column_names}
        for name, column in columns.items():
            bad = ~np.isfinite(real_numbers(column, f"labels: {path}, {name}"))
            if bad.any():
                episode, frame = (columns[key][int(np.argmax(bad))] for key in ("episode_index", "frame_index"))
                raise ValueError(
                    f"labels: {path}, {name} is not a number at episode {episode}, frame {frame}: {_REMEDY} again"
                )
        values = {name: column.to_numpy() for name, column in columns.items()}
        return cls(values.pop("episode_index"), values.pop("frame_index"), values, about)

    def at(self, episode: np.ndarray, frame: np.ndarray, path: Path) -> dict[str, np.ndarray]:
        """The columns at other frames i64[M], i64[M]. Raises ValueError for one that they do not have."""
        rows = rows_at(self.episode, self.frame, (episode, frame))
        if (rows < 0).any():
            missing = int(np.argmin(rows))
            raise ValueError(
                f"labels: {path} has none of episode {episode[missing]}, frame {frame[missing]}: {_REMEDY} again"
            )
        return {name: column[rows] for name, column in self.columns.items()}


def fingerprint(files: LeRobotFiles) -> str:
    """SHA-256 of what labels are about: which frames there are, how many a second, what was to be done and was, and how
    episodes ended. Images do not count, as reading them takes long."""
    found = hashlib.sha256(f"{files.fps:g}".encode())
    kept = [name for name in ("episode_index", "length", SUCCESS) if name in files.episodes.column_names]
    tables = [files.episodes.select(kept)]
    found.update(json.dumps(sorted(files.sentences("tasks", "task").items())).encode())
    moved = [name for name, feature in sorted(files.features.items()) if feature["dtype"] in ("float32", "float64")]
    hashed = [*_HASHED, *(name for name in moved if name not in (*_HASHED, "timestamp"))]
    for path in files.data.episodes:
        names = [name for name in hashed if name in pq.read_schema(path).names]
        tables.append(pq.read_table(path, columns=names))
    for table in tables:
        sink = pa.BufferOutputStream()
        plain = table.combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain)
        found.update(sink.getvalue())
    return found.hexdigest()
