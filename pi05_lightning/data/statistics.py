"""Exact statistics of a LeRobot dataset's states and actions, computed by duckdb from the parquet files.

LeRobot's own are count-weighted means of per-episode quantiles, which are not the dataset's quantiles. These are, to
rounding: linear interpolation between order statistics, as `numpy.quantile`. The names are LeRobot's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from glob import escape
from itertools import batched
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.frame_cache import cache_folder
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.transforms import Quantiles
from pi05_lightning.files.local import read_json, write_json

log = logging.getLogger(__name__)

CACHE = Path("meta") / "pi05_stats.json"
BYTES_PER_VALUE = 16  # a double, and as much again while it is read
QUANTILES = (0.01, 0.99)
VERSION = 2
"""Of what is kept: entries of another are computed anew. Raise it with every change of what a statistic is."""
_FILE = "pi05_file"  # name of the column that says where a row is from; `filename` may be one of the dataset's


@dataclass(frozen=True)
class Relative:
    """Actions as offsets from the state at their chunk's first step, for chosen dims."""

    horizon: int
    """Steps of a chunk: the action of step t + k, k < horizon, is taken relative to the state of step t."""
    dims: tuple[int, ...]
    """Dims of the action that are made relative; the others stay as they are."""
    action: str = "action"
    state: str = "observation.state"
    state_dims: tuple[int, ...] | None = None
    """Dims of the state that they are relative to, in the same order; by default the same numbers."""

    def __post_init__(self) -> None:
        if self.horizon < 1 or (self.state_dims is not None and len(self.state_dims) != len(self.dims)):
            raise ValueError("relative actions need a horizon of at least 1, and as many state_dims as dims")

    def state_dim(self, dim: int) -> int:
        """The state's dim that the action's dim is relative to."""
        return dim if self.state_dims is None else self.state_dims[self.dims.index(dim)]


@dataclass(frozen=True)
class FeatureStats:
    """Per dimension, f64[A]; std is the population's. count: frames.  outside: i64[A], values beyond q01 or q99."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    outside: np.ndarray
    count: int

    @property
    def constant(self) -> np.ndarray:
        """bool[A]: dims that never change, whose normalised value says nothing."""
        return self.min == self.max

    @property
    def zero_range(self) -> np.ndarray:
        """bool[A]: dims that do change, but between q01 and q99 do not; their rare values blow up when normalised."""
        return (self.q01 == self.q99) & ~self.constant

    def to_dict(self) -> dict[str, Any]:
        return {name: value if name == "count" else value.tolist() for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureStats:
        arrays = {name: np.array(value) for name, value in values.items() if name != "count"}
        return cls(**arrays, count=int(values["count"]))


class Stats(dict[str, FeatureStats]):
    """Statistics by feature key."""

    def quantiles(self, keys: Iterable[str]) -> Quantiles:
        """What normalises features concatenated in this order; of no dimension for no features."""
        parts = [self[key] for key in keys]
        q01, q99 = (np.concatenate([np.empty(0), *(getattr(part, q) for part in parts)]) for q in ("q01", "q99"))
        return Quantiles(q01, q99)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain types, as JSON and checkpoints hold them."""
        return {key: feature.to_dict() for key, feature in self.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Stats:
        """The inverse of `to_dict`."""
        return cls({key: FeatureStats.from_dict(feature) for key, feature in values.items()})


def compute(
    root: Path,
    keys: Sequence[str],
    episodes: Sequence[int] | None = None,
    relative: Relative | None = None,
    memory: int = 1 << 30,
) -> Stats:
    """Statistics over all frames, or those of some episodes.

    relative: take these dims of the action as they are trained on; every pair of a frame and a later action of its
    chunk inside the episode counts once.  memory: bytes for values held at a time; more dims than fit take more passes.
    Raises ValueError for a key that is no vector, and BadSample (file, episode, frame, key) for NaN, infinity, missing
    values and wrong widths.
    """
    files = LeRobotFiles.open(root)
    with (
        tempfile.TemporaryDirectory(prefix="pi05_stats_") as spill,
        duckdb.connect(config={"temp_directory": spill}) as connection,
    ):
        frames = _Frames(files, episodes, memory, connection)
        return frames.statistics(list(dict.fromkeys(keys)), relative)


def load_or_compute(
    root: Path,
    keys: Sequence[str],
    episodes: Sequence[int] | None = None,
    relative: Relative | None = None,
) -> Stats:
    """As `compute`, from meta/pi05_stats.json of the dataset where that was computed from the same data.

    The same data: the parquet files' sizes and dates are compared, since they may be large. The statistics of a dataset
    that is read-only are kept in the user's cache.
    """
    files = LeRobotFiles.open(root)
    request = _request(files, keys, episodes, relative)
    cache = (root if os.access(root / "meta", os.W_OK) else cache_folder(root)) / CACHE
    entries = _read_cache(cache)
    if request in entries:
        return Stats.from_dict(entries[request])
    stats = compute(root, keys, episodes, relative)
    try:
        write_json(cache, {"version": VERSION, "entries": {**entries, request: stats.to_dict()}}, indent=None)
    except OSError as error:
        log.warning("statistics are not kept, %s cannot be written (%s)", cache, error)
    return stats


def vector_keys(files: LeRobotFiles) -> list[str]:
    """Features that are vectors of floating-point numbers: states and actions, not timestamps and indices."""
    return [
        key
        for key, feature in files.features.items()
        if feature["dtype"].startswith("float") and len(feature["shape"]) == 1 and key != "timestamp"
    ]


class _Frames:
    """The parquet rows of chosen episodes, read by duckdb a few dimensions at a time."""

    def __init__(
        self, files: LeRobotFiles, episodes: Sequence[int] | None, memory: int, connection: duckdb.DuckDBPyConnection
    ) -> None:
        self.files, self.memory, self.connection = files, memory, connection
        # a path is a pattern to duckdb, and a folder called key=value a column
        paths = ", ".join("'" + escape(str(path)).replace("'", "''") + "'" for path in _data_paths(files, episodes))
        self.rows = f"(SELECT * FROM read_parquet([{paths}], filename = '{_FILE}', hive_partitioning = false)"
        if episodes is not None:
            self.rows += f" WHERE episode_index IN ({', '.join(str(int(episode)) for episode in episodes)})"
        self.rows += ")"
        self.connection.execute("SET preserve_insertion_order = false")

    def query(self, sql: str) -> duckdb.DuckDBPyConnection:
        """Raises ValueError for files that are damaged."""
        try:
            return self.connection.execute(sql)
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            raise ValueError(
                f"{self.files.root}: a data file is missing or damaged ({str(error).splitlines()[0]}); restore it from"
                " its origin"
            ) from error

    def statistics(self, keys: Sequence[str], relative: Relative | None) -> Stats:
        widths = {key: self._width(key) for key in keys}
        count = self._count_frames(widths | ({relative.state: self._width(relative.state)} if relative else {}))
        offsets = relative.dims if relative and relative.action in widths else ()
        places = [(key, dim) for key in keys for dim in range(widths[key])]
        plain = [place for place in places if not (relative and place[0] == relative.action and place[1] in offsets)]
        found: dict[tuple[str, int], tuple[float, ...]] = {}
        for part in batched(plain, max(1, self.memory // (BYTES_PER_VALUE * max(count, 1)))):
            found |= {place: _summary(values) for place, values in self._read(part).items()}
        for dim in offsets:
            assert relative is not None
            found[relative.action, dim] = _summary(self._relative(relative, dim))
        features = {}
        for key in keys:
            mean, std, least, most, q01, q99, outside = np.array([found[key, dim] for dim in range(widths[key])]).T
            features[key] = FeatureStats(mean, std, least, most, q01, q99, outside.astype(np.int64), count)
        return Stats(features)

    @cached_property
    def _columns(self) -> dict[str, str]:
        return {name: kind for name, kind, *_ in self.query(f"DESCRIBE SELECT * FROM {self.rows}").fetchall()}

    def _is_list(self, key: str) -> bool:
        return self._columns[key].endswith("]")

    def _width(self, key: str) -> int:
        feature = self.files.features.get(key)
        if feature is None or key not in self._columns or len(feature["shape"]) != 1:
            raise ValueError(
                f"{self.files.root} has no vector {key!r} in its data: name one of {vector_keys(self.files)}"
            )
        return feature["shape"][0]

    def _count_frames(self, widths: dict[str, int]) -> int:
        """Raises BadSample when a row has more or fewer values than meta/info.json says."""
        wrong = {key: f"len({_name(key)}) != {width}" for key, width in widths.items() if self._is_list(key)}
        counts = ", ".join(["count(*)", *(f"count_if({condition})" for condition in wrong.values())])
        (count, *numbers), *_ = self.query(f"SELECT {counts} FROM {self.rows}").fetchall()
        for key, number in zip(wrong, numbers, strict=True):
            if number:
                raise self._bad(key, wrong[key], f"expected {widths[key]} values")
        return count

    def _read(self, places: Sequence[tuple[str, int]], order: str = "") -> dict[tuple[str, int], np.ndarray]:
        """Columns f64[frames]. Raises BadSample for the first value that is absent, NaN or infinite."""
        select = ", ".join(f"{self._value(*place)} AS c{i}" for i, place in enumerate(places))
        columns = self.query(f"SELECT {select} FROM {self.rows} {order}").fetchnumpy()
        for place, column in zip(places, columns.values(), strict=True):
            if np.ma.is_masked(column) or not np.isfinite(column).all():
                value = self._value(*place)
                raise self._bad(place[0], f"{value} IS NULL OR NOT isfinite({value})", "expected finite numbers")
        return {place: np.asarray(column) for place, column in zip(places, columns.values(), strict=True)}

    def _relative(self, relative: Relative, dim: int) -> np.ndarray:
        action_place, state_place = (relative.action, dim), (relative.state, relative.state_dim(dim))
        in_order = "ORDER BY episode_index, frame_index"
        columns = self._read([action_place, state_place], in_order)
        action, state = columns[action_place], columns[state_place]
        frames = self.query(f"SELECT episode_index, frame_index FROM {self.rows} {in_order}").fetchnumpy()
        episode, frame = frames["episode_index"], frames["frame_index"]
        parts = []
        for step in range(min(relative.horizon, len(action))):
            now, later = slice(0, len(action) - step), slice(step, None)
            in_chunk = (episode[later] == episode[now]) & (frame[later] == frame[now] + step)
            parts.append((action[later] - state[now])[in_chunk])
        return np.concatenate(parts)

    def _value(self, key: str, dim: int) -> str:
        """SQL for one dimension of a feature; LeRobot stores features of one dimension as plain numbers."""
        return f"{_name(key)}[{dim + 1}]::DOUBLE" if self._is_list(key) else f"{_name(key)}::DOUBLE"

    def _bad(self, key: str, condition: str, expected: str) -> BadSample:
        row = self.query(
            f"SELECT {_FILE}, episode_index, frame_index, {_name(key)}::VARCHAR FROM {self.rows}"
            f" WHERE {condition} ORDER BY episode_index, frame_index LIMIT 1"
        ).fetchone()
        assert row is not None
        file, episode, frame, value = row
        return BadSample(
            f"{file}: episode {episode}, frame {frame}, {key} is {value}; {expected}. Correct the data or leave the"
            " episode out with `episodes`"
        )


def _summary(values: np.ndarray) -> tuple[float, ...]:
    low, high = np.quantile(values, QUANTILES)
    outside = np.count_nonzero((values < low) | (values > high))
    return values.mean(), values.std(), values.min(), values.max(), low, high, outside


def _data_paths(files: LeRobotFiles, episodes: Sequence[int] | None) -> list[Path]:
    place = np.stack([files.column("data/chunk_index"), files.column("data/file_index")], axis=1)
    if episodes is not None:
        unknown = np.setdiff1d(episodes, files.column("episode_index")).tolist()
        if unknown:
            raise ValueError(f"{files.root} has no episodes {unknown}: correct `episodes`")
        place = place[np.isin(files.column("episode_index"), episodes)]
    if not len(place):
        raise ValueError(f"{files.root}: statistics need at least one episode, and none was chosen")
    return [files.data_path(*number) for number in np.unique(place, axis=0)]


def _request(
    files: LeRobotFiles, keys: Sequence[str], episodes: Sequence[int] | None, relative: Relative | None
) -> str:
    """What was asked of which data, as one digest."""
    digest = hashlib.blake2b(digest_size=16)
    chosen = None if episodes is None else sorted({int(episode) for episode in episodes})
    digest.update(json.dumps([sorted(keys), chosen, relative and asdict(relative)]).encode())
    for path in _data_paths(files, episodes):
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing: restore it from its origin") from error
        digest.update(f"{path.relative_to(files.root)} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, default={})
        return content["entries"] if content.get("version") == VERSION else {}
    except (ValueError, KeyError) as error:
        log.warning("%s is damaged (%s) and is written anew", path, error)
        return {}


def _name(key: str) -> str:
    return '"' + key.replace('"', '""').replace("{", "{{").replace("}", "}}") + '"'
